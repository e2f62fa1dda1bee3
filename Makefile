# Every target makes the environment it needs: `make demo` and `make test` work on a fresh checkout.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test fake gpu test-all lint format docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make the environment in .venv, with the tested versions

$(READY): pyproject.toml setup.py constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; set PYTHON=<a Python 3.11 or 3.12>"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $(READY)

demo: $(READY) ## train on Sudoku for about three minutes, from the shipped base weights
	$(BIN)/python -m spg.train task=sudoku estimator=mixture beta=1.5

test: $(READY) ## run the tests that take minutes at most
	$(BIN)/python -m pytest

fake: $(READY) ## run the code for GPUs on a pretended device; needs a C++ compiler
	$(BIN)/python -m pytest -m fake --dist worksteal tests/fake

gpu: $(READY) ## on a GPU: its tests, a short run, and an 8B with random weights beside its plan, in nine minutes
	$(BIN)/python -m benchmarks.gpu

test-all: fake ## run all tests, the long ones too
	$(BIN)/python -m pytest -m ""

lint: $(READY) ## check style, types and the order of the packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY) ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove the environment and what tools left, but no runs
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
