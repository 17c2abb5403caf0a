# make run: everything from a bare machine to a trained model. make test: the same environment, then the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: run setup format check test test-full bench claims clean

run: $(VENV)/.installed
	$(BIN)/python run.py model=gpt norm=peri

setup: $(VENV)/.installed-test

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

# One thread per worker: two workers with two threads each would wait for each other most of the time.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow and not gpu"

test-full: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: setup
	$(BIN)/python -m trainkit.bench norm_layer

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# Two steps, so that torch is never resolved beyond its pin, which on Linux would pull the CUDA packages.
$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(INSTALL) -e ".[test]"
	@touch $(VENV)/.installed $@

# What was measured before is not run again; an interrupted claim goes on.
claims: $(VENV)/.installed
	$(BIN)/python -m trainkit.report claims

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache .hypothesis
