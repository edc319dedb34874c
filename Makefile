# Two commands to know: `make demo` and `make test`. Both make .venv with the tested versions when it is not there.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
WORKERS ?= auto
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt
PINS := pyproject.toml constraints.txt

.PHONY: help demo test lint docs bench clean

help:
	@echo "make demo    adapt a small network to drifted digits; leaves a run folder with report.html"
	@echo "make test    run the tests, one process a core; make test ARGS='tests/kernels -k spread' WORKERS=0 runs some in one"
	@echo "make lint    ruff and mypy"
	@echo "make docs    write the generated pages and tables anew"
	@echo "make bench   measure layers and steps on this machine; make bench ARGS='transfer' for another suite"
	@echo "make clean   remove $(VENV) and caches"

demo: $(VENV)/.installed
	$(BIN)/edgetune train $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(ARGS) .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python tools/generate.py $(ARGS)

bench: $(VENV)/.installed
	@for suite in $(or $(ARGS),layers steps); do $(BIN)/edgetune bench $$suite || exit $$?; done

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch goes in first and alone, so that nothing else can pull another build of it. setuptools comes beside it
# (torch asks for it anyway) and builds the package in place, without a second download for an isolated build.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "edgetune needs Python 3.10 or newer: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@echo "making $(VENV) with the tested versions (once; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch setuptools
	@touch $@

$(VENV)/.installed: $(VENV)/.torch $(PINS)
	$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch $(PINS)
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.installed
