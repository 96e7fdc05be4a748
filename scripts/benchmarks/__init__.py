"""The subjects of `scripts/benchmark.py`: each yields the peers to compare; all are measured in the same way."""

import hf_maskformer  # noqa: F401 - before transformers, from which it hides a torchvision that does not import
