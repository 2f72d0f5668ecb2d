# Each target makes its own environment: `.venv` by the standard library's venv, filled by uv (fetched into it where none is on PATH).
# `.venv/.ready` is written last and holds the folder it was made in. No such file, or another folder's: the environment is made anew.
# pyproject.toml newer than it: uv brings the packages up to date. Otherwise neither pip nor uv is called.

VENV  := .venv
READY := $(VENV)/.ready
BIN   := $(VENV)/bin
# Extra arguments, for example: make test ARGS='-m slow'
ARGS  ?=
# The first of these that is Python 3.11 or newer makes the environment; PYTHON=... names another.
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11

.PHONY: help quickstart test lint mutants environment FORCE
help:
	@echo 'make quickstart   train the quickstart (federated, private, sparse) and show what came out'
	@echo 'make test         run the tests           (make test ARGS="-m slow" for the long ones)'
	@echo 'make lint         ruff and mypy'
	@echo 'make mutants      break each guarded line in a scratch copy and see its test go red'
	@echo 'The first of them takes minutes: it installs the packages into $(VENV).'

quickstart: $(READY)
	@$(BIN)/fed-dpprune run configs/quickstart.toml $(ARGS)

test: $(READY)
	$(BIN)/pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

mutants: $(READY)
	$(BIN)/python tests/mutants/run.py $(ARGS)

environment: $(READY)

# A copied or moved checkout, or an interpreter that is gone, counts as no environment.
ifneq ($(CURDIR)|$(VENV)/bin/python,$(shell cat $(READY) 2>/dev/null)|$(wildcard $(BIN)/python))
$(READY): FORCE
endif

$(READY): pyproject.toml
	@if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ] || ! $(BIN)/python -c '' 2>/dev/null; then \
	    for candidate in $(PYTHON); do \
	        if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python="$$candidate"; break; fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo 'fed-dpprune: Python: none of "$(PYTHON)" is Python 3.11 or newer; install one or name it: make PYTHON=/path/to/python' >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$("$$python" --version) (once; takes minutes) ..."; \
	    rm -f $@; \
	    "$$python" -m venv --clear $(VENV) || exit 1; \
	fi
	@echo 'Installing the packages ...'
	@uv=uv; \
	if ! "$$uv" --version >/dev/null 2>&1; then \
	    uv=$(BIN)/uv; \
	    "$$uv" --version >/dev/null 2>&1 || $(BIN)/python -m pip install -qq --disable-pip-version-check uv || exit 1; \
	fi; \
	if [ -t 2 ]; then quiet=; else quiet=--quiet; fi; \
	"$$uv" pip install $$quiet --python $(BIN)/python --editable '.[dev]'
	@echo '$(CURDIR)' > $@

FORCE:
