# Everything is installed into .venv; nothing outside this folder is touched.
PYTHON ?= python3
BIN := .venv/bin
MODEL ?= reference
INSTALLED := .venv/.installed
INSTALLED_DEV := .venv/.installed-dev

.PHONY: help demo test test-faults lint format bench clean

help:
	@echo "make demo   install, give a language model a memory, measure it (MODEL=name for another model)"
	@echo "make test   install, check style and types, run all tests"
	@echo "make test-faults   kill writers of datastores 100 times each, damage datastores (minutes)"
	@echo "make lint   style and types only"
	@echo "make bench  measure speed (minutes); results go to benchmarks/results"

$(INSTALLED): requirements.lock pyproject.toml
	@echo "== Installing memlm into .venv (torch, transformers, faiss; about a minute) =="
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "memlm needs Python 3.11 or newer; name one: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-compile --requirement requirements.lock
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-compile --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED) requirements-dev.lock
	@echo "== Installing what the tests need =="
	@$(BIN)/pip install --quiet --disable-pip-version-check --requirement requirements-dev.lock
	@touch $@

demo: $(INSTALLED)
	@echo "== memlm demo --model $(MODEL) =="
	@$(BIN)/memlm demo --model $(MODEL)

lint: $(INSTALLED_DEV)
	@echo "== ruff, pyrefly =="
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyrefly check --output-format min-text

format: $(INSTALLED_DEV)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

test: lint
	@echo "== pytest: unit, property, model families, command line, killed processes, doctests, README =="
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 tests src --doctest-modules

test-faults: $(INSTALLED_DEV)
	@echo "== pytest: 100 kills of each way to write a datastore, 4,000 changes, 1,500 damaged files, 15,000 manifests =="
	@OMP_NUM_THREADS=1 MEMLM_KILLS=100 $(BIN)/pytest -n 2 --dist worksteal -vv \
		tests/test_state_machine.py tests/test_faults.py tests/test_injuries.py

bench: $(INSTALLED_DEV)
	@$(BIN)/python -m benchmarks.speed

clean:
	rm -rf .venv demo build dist
