# Targets with a "##" comment are commands; `make` alone prints them.
PYTHON ?= python3
# An environment and its constraints: "make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt" tests with the
# oldest versions that the package allows.
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help demo test slow page check format docs benchmark clean

help: ## Print these commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 12

demo: $(INSTALLED) ## Train a small model on drawn scenes, evaluate it, draw its predictions (outputs/demo)
	rm -rf outputs/demo
	$(BIN)/python scripts/demo.py --output outputs/demo

# One process per core (at most eight), each with one thread: the tests' small models would leave more threads idle.
test: $(INSTALLED) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --maxprocesses 8

slow: $(INSTALLED) ## Run the tests that take minutes: several processes, thousands of random cases, the demo's score
	$(BIN)/python -m pytest -m slow

# Gradio does not accept the Pillow version of the other environments.
page: ## Test the web page in Chromium, in its own environment (.venv-page)
	$(PYTHON) -m venv .venv-page
	.venv-page/bin/python -m pip install --quiet "$$(grep '^torch==' $(CONSTRAINTS))"
	sed 's/^pillow==.*/pillow==12.3.0/' $(CONSTRAINTS) > .venv-page/constraints.txt
	.venv-page/bin/python -m pip install --quiet --constraint .venv-page/constraints.txt --editable '.[demo]' playwright pytest
	.venv-page/bin/python -m pytest tests/test_demo_page.py -m "slow or not slow" -rs

check: $(INSTALLED) ## Lint, check formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	# The scripts separately: scripts/evaluate.py would be mistaken for the package evaluate.
	$(BIN)/mypy scripts

format: $(INSTALLED) ## Format the code and sort imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED) ## Build the pages in docs/ into a site (build/docs); warnings are errors
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/docs

benchmark: $(INSTALLED) ## Compare speed with transformers' own MaskFormer
	$(BIN)/python scripts/benchmark.py forward --kept 20
	$(BIN)/python scripts/benchmark.py photo
	$(BIN)/python scripts/benchmark.py load
	$(BIN)/python scripts/benchmark.py step
	$(BIN)/python scripts/benchmark.py criterion
	$(BIN)/python scripts/benchmark.py postprocess --threads 1
	$(BIN)/python scripts/benchmark.py preprocess --threads 1
	$(BIN)/python scripts/benchmark.py data --threads 1
	$(BIN)/python scripts/benchmark.py metric

clean: ## Remove the environment, caches and outputs
	rm -rf .venv .venv-oldest .venv-page .venv-torch outputs build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis

# torch is installed first and at its exact version, so that no other package selects its build.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' $(CONSTRAINTS))"
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $(INSTALLED)
