# make run | test | lint | conformance | bench | soak: each works on a fresh clone with Python >= 3.11 (with pip and venv) and make.

PYTHON ?= python3
VENV   ?= .venv
NODES  ?= 3
BIN    := $(VENV)/bin

.PHONY: run test test-tools lint conformance bench bench-gossip chaos soak fuzz fuzz-guided browser-tools screenshots lock conformance-lock clean
.DEFAULT_GOAL := help

help:
	@echo "make run     three nodes with the built-in model on 127.0.0.1:8080-8082, until Ctrl-C (NODES=N for more)"
	@echo "make test    every test; make lint: ruff, mypy --strict, import contracts; make bench: the benchmark"
	@echo "make test-tools   the metrics, alerts and dashboards on a real Prometheus, and the status page in a real browser"
	@echo "make conformance   real clients at pinned versions against three nodes, and /openapi.json by schemathesis (8 minutes)"
	@echo "make soak    20,000 generations on a tiny model: does the engine's memory stay flat? (some minutes)"
	@echo "make bench-gossip   gossip of N=10 processes beside serf's, in network namespaces (root; half an hour)"
	@echo "make chaos   500 streams while nodes are killed and stopped, overload, rude clients, forwarding (a quarter of an hour)"
	@echo "make fuzz    a million random and mutated inputs to every decoder (a quarter of an hour); make fuzz-guided: by coverage"
	@echo "make browser-tools   what tests/browser needs beside Debian's chromium (npm); make screenshots: docs/images anew"
	@echo "make lock    compute both locks anew from pyproject.toml; make clean: remove the environment"

# The locks pin every package with its hash: what running needs, and what tests and checks need as well. The stamps make
# an install happen once per change of its lock.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(VENV)/.installed: pyproject.toml requirements-run.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11, say: make run PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing AI Cluster into $(VENV) (once, a few minutes on a slow line)"
	$(PIP) --require-hashes -r requirements-run.lock
	$(PIP) --no-deps -e .
	@touch $@

$(VENV)/.tests-installed: $(VENV)/.installed requirements.lock
	@echo "installing what tests and checks need into $(VENV)"
	$(PIP) --require-hashes -r requirements.lock
	@touch $@

run: $(VENV)/.installed
	@exec $(BIN)/ai-cluster up --nodes $(NODES)

# Unit tests and those in virtual time share nothing, so two processes run them; those of real nodes take turns on the
# cores.
test: $(VENV)/.tests-installed
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/simulation tests/unit
	$(BIN)/python -m pytest tests/cluster

# What needs programs of the system beside Python: Debian's prometheus (with promtool) and chromium, and npm.
test-tools: $(VENV)/.tests-installed browser-tools
	$(BIN)/python -m pytest tests/observability tests/browser

lint: $(VENV)/.tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Each client in an environment of its own below .conformance/, Node included. CLIENTS="openai_node ai_sdk" for some.
CLIENTS ?=
conformance: $(VENV)/.tests-installed
	$(BIN)/python -m tests.conformance $(CLIENTS)

bench: $(VENV)/.tests-installed
	$(BIN)/python -m tests.benchmark.slice

soak: $(VENV)/.tests-installed
	$(BIN)/python -m tests.soak.engine

# Each prints one JSON line and fails where a law is broken; --help says which. Alone on the machine, or times mean nothing.
chaos: $(VENV)/.tests-installed
	$(BIN)/python -m tests.cluster.chaos --streams 500 --kill
	$(BIN)/python -m tests.cluster.forwarding
	$(BIN)/python -m tests.cluster.rude_clients
	$(BIN)/python -m tests.cluster.overload

# As root: sudo make bench-gossip N=30. Needs iproute2 and nftables; serf where it is to be measured too.
N ?= 10
bench-gossip: $(VENV)/.tests-installed
	$(BIN)/python -m tests.benchmark.gossip $(N)
	$(BIN)/python -m tests.benchmark.gossip.cpu

INPUTS ?= 1000000
fuzz: $(VENV)/.tests-installed
	$(BIN)/python -m tests.fuzz --inputs $(INPUTS)

# atheris has wheels for some versions of Python only, so it lives in an environment of its own.
FUZZ_SECONDS ?= 300
fuzz-guided:
	@test -x $(VENV)-fuzz/bin/python || $(PYTHON) -m venv $(VENV)-fuzz
	@$(VENV)-fuzz/bin/python -m pip install --quiet --disable-pip-version-check atheris msgpack cryptography
	for subject in section link datagram; do \
	  $(VENV)-fuzz/bin/python -m tests.fuzz.guided $$subject -max_total_time=$(FUZZ_SECONDS) -max_len=2048 || exit 1; done

# Accessibility is judged by axe-core, which git does not hold. Playwright is in the lock; the browser is the system's.
AXE ?= 4.14.1
browser-tools:
	npm install --prefix .cache/npm --no-save --ignore-scripts --no-audit --no-fund --loglevel error axe-core@$(AXE)

screenshots: $(VENV)/.tests-installed
	$(BIN)/python -m tests.browser.screenshots

lock:
	$(PYTHON) -m venv $(VENV)-lock && $(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile pyproject.toml --extra test --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements.lock
	$(VENV)-lock/bin/uv pip compile pyproject.toml --constraint requirements.lock --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-emit-find-links --no-header --no-annotate -o requirements-run.lock
	rm -rf $(VENV)-lock

# After a version was changed in a requirements.in or package.json of tests/conformance: no address of a registry is kept.
conformance-lock: $(VENV)/.tests-installed
	$(BIN)/python -m tests.conformance.lock

clean:
	rm -rf $(VENV) $(VENV)-lock $(VENV)-fuzz .conformance build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
