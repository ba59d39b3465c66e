# `make run` and `make test` need nothing but Python >= 3.10 and make: they set up .venv by themselves.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: help run test lint types format check clean

help:
	@echo "make run     install, then train Mono-Forward on the packaged digits"
	@echo "make test    install, then run all tests (BPFREE_DATA=... adds those on the full data sets)"
	@echo "make check   lint, types and tests, as CI does"
	@echo "make format  format the code"
	@echo "make clean   remove the environment and caches"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[graph]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,carbon,graph,plot,tune]'
	touch $@

run: $(VENV)/.installed
	$(BIN)/bpfree run --algo mf --dataset digits --target-accuracy 96

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint types test

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
