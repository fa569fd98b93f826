# make run | test | lint | bench | soak: each works on a fresh clone with Python >= 3.11 (with pip and venv) and make.

PYTHON ?= python3
VENV   ?= .venv
NODES  ?= 3
BIN    := $(VENV)/bin

.PHONY: run test lint bench soak lock clean
.DEFAULT_GOAL := help

help:
	@echo "make run     three nodes with the built-in model on 127.0.0.1:8080-8082, until Ctrl-C (NODES=N for more)"
	@echo "make test    every test; make lint: ruff, mypy --strict, import contracts; make bench: the benchmark"
	@echo "make soak    20,000 generations on a tiny model: does the engine's memory stay flat? (some minutes)"
	@echo "make lock    compute requirements.lock anew from pyproject.toml; make clean: remove the environment"

# The lock pins every package with its hash; the stamps make the install happen once per change of it.
$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11, say: make run PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing AI Cluster into $(VENV) (once, a few minutes on a slow line)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

run: $(VENV)/.installed
	@exec $(BIN)/ai-cluster up --nodes $(NODES)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed
	$(BIN)/python -m tests.benchmark.slice

soak: $(VENV)/.installed
	$(BIN)/python -m tests.soak.engine

lock:
	$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements.lock
	rm -rf $(VENV)-lock

clean:
	rm -rf $(VENV) $(VENV)-lock build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
