# What a newcomer, a developer and CI run. Each target sets up what it needs in .venv, once.

PYTHON ?= python3
VENV ?= .venv

python := $(VENV)/bin/python
CASES ?= 200
install := $(python) -m pip install --constraint constraints.txt

.DELETE_ON_ERROR:
.PHONY: help demo test lab soak matrix lint types docs wheel clean

help: ## say what there is to make
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 8

demo: $(VENV)/.examples ## train the digits example with two workers and print its test accuracy
	$(python) examples/digits.py

test: $(VENV)/.dev ## run the whole fast suite
	$(python) -m pytest

lab: $(VENV)/.dev ## as root on Debian: run what needs several hosts and a SLURM, which it sets up on this machine
	sh tests/lab/packages.sh
	$(python) -m pytest --lab --numprocesses 0 --durations 10 tests/lab

soak: $(VENV)/.dev ## run what takes long: new random cases in each drawn test (CASES=200), kills at random moments
	$(python) -m pytest --soak $(CASES) -m "soak or drawn"

matrix: $(VENV)/.dev ## run the suite with the oldest and the newest versions that we support
	$(python) tests/matrix.py

lint: $(VENV)/.dev ## check style and format
	$(python) -m ruff check .
	$(python) -m ruff format --check .

types: $(VENV)/.dev ## check types, strictly
	$(python) -m mypy

docs: $(VENV)/.docs ## build the documentation in docs/_build, warnings being errors
	$(python) -m sphinx --fail-on-warning --keep-going --quiet docs docs/_build

wheel: $(VENV)/.dev ## build the source distribution in dist, and the wheel from it
	rm -rf dist
	$(python) -m build

clean: ## remove all that was made
	rm -rf $(VENV) dist docs/_build .mypy_cache .ruff_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=..." if sys.version_info < (3, 10) else 0)'
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.examples: extra = examples
$(VENV)/.dev: extra = examples,dev
$(VENV)/.docs: extra = docs
$(VENV)/.examples $(VENV)/.dev $(VENV)/.docs: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(install) --editable '.[$(extra)]'
	touch $@
