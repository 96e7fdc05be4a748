"""What pyproject.toml cannot say: the scripts are part of the installed package, where its command finds them."""

from setuptools import find_packages, setup

SCRIPTS = {"hf_maskformer.scripts": "scripts", "hf_maskformer.scripts.benchmarks": "scripts/benchmarks"}
setup(packages=[*find_packages(include=["hf_maskformer*"]), *SCRIPTS], package_dir=SCRIPTS)
