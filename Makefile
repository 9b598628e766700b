# Everything from nothing: each target makes the environment it needs, in .venv, and stamps what it has installed there.
#   make quickstart ARGS="--arch bert"      PYTHON=python3.12 make test      make test-slow WORKERS=1

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
ARGS ?=

BIN := $(VENV)/bin
CONSTRAINTS := constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)

# One thread a test worker: several that share the cores slow each other down many times over.
PYTEST := env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile
UNATTENDED := not gpu and not slurm and not network

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-slow test-oldest check format bench docs clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/.stamp-dev ## make the environment for development (tests, checks) in .venv
	@echo "ready: . $(BIN)/activate"

quickstart: $(VENV)/.stamp-run ## install, then train, score and sample a small model (about 5 minutes of training)
	$(BIN)/cottention quickstart $(ARGS)

test: $(VENV)/.stamp-test ## run the tests that need no GPU, cluster or network
	$(PYTEST) -m "not slow and $(UNATTENDED)" $(ARGS)

test-slow: $(VENV)/.stamp-test ## run the tests that take longer
	$(PYTEST) -m "slow and $(UNATTENDED)" $(ARGS)

test-oldest: ## run the tests with the oldest versions that pyproject.toml allows and we tried, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

check: $(VENV)/.stamp-dev ## format, lint, types, import layers; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.stamp-dev ## format, and mend what the linter can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.stamp-run ## measure the attention against softmax
	$(BIN)/cottention bench attention $(ARGS)

docs: $(VENV)/.stamp-docs ## build the documentation in site/
	$(BIN)/mkdocs build --strict

clean: ## remove environments, caches and builds; runs/ stays
	rm -rf .venv .venv-oldest build site *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "make: no '$(PYTHON)' here; name yours: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) --version). Name another: make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	    { echo "make: $(PYTHON) has no venv module; install it (Debian: apt install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that whatever asks for it later keeps this build.
$(VENV)/.stamp-run: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.stamp-test $(VENV)/.stamp-dev $(VENV)/.stamp-docs: $(VENV)/.stamp-%: $(VENV)/.stamp-run
	$(PIP_INSTALL) --editable '.[$*]'
	@touch $@
