# make demo    the whole job on this machine: draw data, ingest, train, evaluate, report
# make test    lint, type check, tests
# PYTHON=python3.12 chooses the interpreter. The environment is made once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint format install clean

demo: $(READY)
	$(BIN)/python -m pipelines.demo

test: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

install: $(READY)

# pip itself comes first: the one that Debian puts into an environment does not know --build-constraint.
# DS_BUILD_OPS=0: DeepSpeed compiles nothing here; what the jobs use of it needs no compiler.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "msclip needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt pip setuptools wheel
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c constraints.txt --build-constraint constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find msclip pipelines tests -name __pycache__ -type d -prune -exec rm -rf {} +
