# Every target makes .venv itself where it is missing, and renews it when pyproject.toml has changed.
# Variables: PYTHON (3.11 or 3.12) makes the environment; TORCH is what pip is asked for when the
# environment has no torch yet; DEMO_ARGS, PYTEST_ARGS and BENCH_ARGS go to the command behind a target.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# What `make demo` compares with exact training.
DEMO_ARGS ?= --method zero --schedule ga-1 --channels-last
# Tests run side by side: they compile more than they compute. A third worker made it slower.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Named after the content, not the time: a checkout touches files that it does not change.
STAMP := $(VENV)/.installed-$(firstword $(shell cksum pyproject.toml))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install demo test lint types check bench

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP)  ## make or renew .venv (the other targets do it by themselves)

demo: $(STAMP)  ## train a small network exactly and approximately, side by side (DEMO_ARGS)
	$(BIN)/python -m examples.cifar10 --compare $(DEMO_ARGS)

test: $(STAMP)  ## run the tests (PYTEST_ARGS, JOBS)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(PYTEST_ARGS)

lint: $(STAMP)  ## check formatting and lint rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)  ## check types
	$(BIN)/mypy

check: lint types test  ## all that has to pass before a merge

bench: $(STAMP)  ## measure step times against Inductor alone (BENCH_ARGS)
	$(BIN)/python -m benchmarks.steps $(BENCH_ARGS)

# torch goes in first, so that TORCH decides which build it is: the second pip finds it there.
$(STAMP):
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
	  echo "graphpass needs Python 3.11 or 3.12; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) show torch >/dev/null 2>&1 || $(PIP) install '$(TORCH)'
	$(PIP) install -e '.[dev]'
	@rm -f $(VENV)/.installed-*
	@touch $@
