# Every target makes its own .venv first: nothing needs to be installed by hand.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
QUIET ?= --quiet --quiet
# Where the site has an MPI of its own: make setup EXTRAS=dev,encoders,sinks
EXTRAS ?= dev,encoders,mpi,sinks
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install $(QUIET) --constraint constraints.txt
PIP_FAILED := { echo "setup: pip failed, see above; all that it says: make setup QUIET=" >&2; exit 1; }

.PHONY: help setup smoke test check soak bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1 \t\2/' | expand -t 16

setup: $(STAMP) ## make .venv and install everything into it (again when pyproject.toml or constraints.txt changed)

smoke: $(STAMP) ## the whole chain, small, on this machine: text to trained, resumed, evaluated, exported model
	$(BIN)/rookery smoke

test: $(STAMP) ## the whole test suite
	$(BIN)/python -m pytest

check: $(STAMP) ## format, lint, import arrows, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy .

soak: $(STAMP) ## the long tests that `make test` leaves out
	$(BIN)/python -m pytest -m soak --timeout 0

bench: $(STAMP) ## every script of benchmarks/
	@for name in $(basename $(notdir $(sort $(wildcard benchmarks/[a-z]*.py)))); do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done

clean: ## remove .venv, caches and build results; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes before DeepSpeed, whose setup.py looks for it (hence no build isolation). DS_BUILD_OPS=0: training uses
# none of DeepSpeed's compiled operators.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "setup: no '$(PYTHON)' found; name one: make setup PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("setup: Rookery needs Python 3.11 or newer and \"$(PYTHON)\" is %d.%d; name another: make setup PYTHON=python3.12" % v)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "setup: $(PYTHON) cannot make virtual environments; install its venv package (Debian: python3-venv)" >&2; exit 1; }
	@echo "setup: making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "setup: installing torch and build tools (a minute or two)"
	@$(PIP) torch ninja packaging setuptools wheel || $(PIP_FAILED)
	@echo "setup: installing Rookery and the rest"
	@DS_BUILD_OPS=0 $(PIP) --no-build-isolation --editable '.[$(EXTRAS)]' || $(PIP_FAILED)
	@touch $@
