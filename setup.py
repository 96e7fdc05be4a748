"""What pyproject.toml cannot say: the installed package has the scripts, for its command, and the pages they name."""

from setuptools import find_packages, setup

FOLDERS = {
    "hf_maskformer.scripts": "scripts",
    "hf_maskformer.scripts.benchmarks": "scripts/benchmarks",
    "hf_maskformer.docs": "docs",
}
setup(packages=[*find_packages(include=["hf_maskformer*"]), *FOLDERS], package_dir=FOLDERS)
