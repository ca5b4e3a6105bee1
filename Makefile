# Two commands set everything up: `make demo` builds the bundled model, `make test` passes lint, types and tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The CPU build of PyTorch, where the index offers one; a looser pin may fetch gigabytes of CUDA.
TORCH = torch==2.13.0

.PHONY: demo test lint install clean

demo: $(VENV)/.runtime
	$(BIN)/mpq-deploy build --budget 0.35

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.runtime

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)

$(VENV)/.runtime: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[torch,rtx]"
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[torch,rtx,dev]"
	touch $@

clean:
	rm -rf $(VENV) runs
