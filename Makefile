# Two commands set everything up: `make demo` builds the bundled model, `make test` passes lint, types and tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The CPU build of PyTorch, where the index offers one; a looser pin may fetch gigabytes of CUDA.
TORCH = torch==2.13.0
# The exact versions of everything else. Without any: the newest that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt
PIP = $(BIN)/pip install --quiet --disable-pip-version-check $(addprefix -c ,$(CONSTRAINTS))

.PHONY: demo test lint pytest install latest lock test-latest test-oldest fuzz clean

demo: $(VENV)/.runtime
	$(BIN)/mpq-deploy build --budget 0.35

test: lint pytest

pytest: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.runtime

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)

$(VENV)/.runtime: $(BIN)/python pyproject.toml $(CONSTRAINTS)
	$(PIP) -e ".[torch,rtx]"
	touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -e ".[torch,rtx,dev]"
	touch $@

# New mutated files for MINUTES (tests/fuzz); SEED draws others.
MINUTES ?= 10
SEED ?= 0
fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --seed $(SEED)

# A fresh environment of the newest versions that pyproject.toml allows.
latest:
	rm -rf .venv-latest
	$(MAKE) .venv-latest/.dev VENV=.venv-latest CONSTRAINTS=

# Renew constraints.txt from it; run `make test` before committing the change.
lock: latest
	.venv-latest/bin/python scripts/pins.py > .venv-latest/constraints.txt
	cp .venv-latest/constraints.txt constraints.txt

test-latest: latest
	$(MAKE) test VENV=.venv-latest CONSTRAINTS=

# With the lowest versions that pyproject.toml names (needs Python 3.11). Their type stubs differ: no mypy.
test-oldest:
	rm -rf .venv-oldest
	mkdir .venv-oldest
	$(PYTHON) scripts/pins.py --oldest > .venv-oldest/constraints.txt
	$(MAKE) pytest VENV=.venv-oldest CONSTRAINTS=.venv-oldest/constraints.txt

clean:
	rm -rf $(VENV) .venv-latest .venv-oldest runs
