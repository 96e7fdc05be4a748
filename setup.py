"""What pyproject.toml cannot express: the package includes the scripts, for its command, and the docs they refer to."""

from setuptools import find_packages, setup

FOLDERS = {
    "hf_maskformer.scripts": "scripts",
    "hf_maskformer.scripts.benchmarks": "scripts/benchmarks",
    "hf_maskformer.docs": "docs",
}
setup(packages=[*find_packages(include=["hf_maskformer*"]), *FOLDERS], package_dir=FOLDERS)
