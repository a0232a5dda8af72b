PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
EXTRAS ?= demo,test,tools,web

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.timm_rs-installed
RUFF := $(VENV)/.timm_rs-installed-ruff

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz zoo sweep lint clean

help:  ## list the targets and variables
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "  PYTHON    the Python, 3.10 or newer, that makes the environment ($(PYTHON))"
	@echo "  VENV      the environment, made and filled if it is not there ($(VENV))"
	@echo "  PIP_ARGS  more arguments for pip install, e.g. where to find a CPU-only torch; plain pip on"
	@echo "            Linux brings the CUDA build, several gigabytes ($(PIP_ARGS))"
	@echo "  EXTRAS    what to install of setup.cfg; tests of what is missing are skipped ($(EXTRAS))"

install: $(INSTALLED)  ## make the environment, which the other targets do too

demo: $(INSTALLED)  ## train a small RS-Net on handwritten digits, on the CPU, into output/demo
	$(BIN)/python examples/digits_demo.py --output output/demo

test: $(INSTALLED)  ## run the tests
	OMP_NUM_THREADS=1 PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest -p xdist -p pytest_timeout tests -n auto \
		--dist loadfile --no-loadscope-reorder --durations=40

fuzz: $(INSTALLED)  ## run the commands on 3,000 mutated files, into results/fuzz.json
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzzing.py --cases 3000 --output results/fuzz.json

zoo: $(INSTALLED)  ## list again which of timm's architectures become rs_* models
	$(BIN)/python tools/make_zoo.py

sweep: $(INSTALLED)  ## try every rs_* model, into results/zoo.csv; goes on where it was stopped
	$(BIN)/python tools/sweep.py

lint: $(RUFF)  ## check the code with ruff
	$(BIN)/python -m ruff check

clean:  ## remove build leftovers, caches and output/demo; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache output/demo
	find timm_rs timm_rs_cli runtime tests examples benchmarks tools -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): setup.cfg runtime/setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) -e ./runtime -e '.[$(EXTRAS)]'
	@touch $@

$(RUFF): setup.cfg | $(BIN)/python
	$(BIN)/python -m pip install $(PIP_ARGS) $$(sed -n 's/^ *\(ruff==\)/\1/p' setup.cfg)
	@touch $@

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
		echo "error: no '$(PYTHON)' found: install Python 3.10 or newer, or name one: make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "error: $$($(PYTHON) --version 2>&1) is too old: name Python 3.10 or newer: make PYTHON=/path/to/python" >&2; \
		exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "error: $(PYTHON) lacks the venv module: on Debian and Ubuntu, install the package python3-venv" >&2; \
		exit 1; }
	$(PYTHON) -m venv $(VENV)
