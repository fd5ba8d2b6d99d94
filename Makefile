# `make demo` and `make test` need only Python >= 3.11, pip and make; a second run reuses .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# one pytest process per core, at most 4: each holds JAX and TensorFlow in memory
WORKERS ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); [ $$cores -lt 4 ] && echo $$cores || echo 4)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: setup demo test test-all lint format
.DEFAULT_GOAL := setup

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "fastgpu needs Python >= 3.11; name one: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/fastgpu demo

test: lint
	$(BIN)/pytest -n $(WORKERS)

# also the tests marked slow
test-all: lint
	$(BIN)/pytest -n $(WORKERS) -m ''

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
