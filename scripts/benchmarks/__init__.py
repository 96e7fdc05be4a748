"""The subjects of `scripts/benchmark.py`: each gives the peers to compare; how they are measured is the same for all."""
