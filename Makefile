# Needs Python 3.11 to 3.13 with pip, and make: `make demo` and `make test` do all the set-up themselves.
SUPPORTED = import sys, venv, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
PYTHON ?= $(firstword $(foreach p,python3 python python3.13 python3.12 python3.11,$(shell $(p) -c "$(SUPPORTED)" 2>/dev/null && echo $(p))))
BIN = .venv/bin

.PHONY: demo test test-fast lint faults frameworks docs gpu setup clean

demo: setup
	$(BIN)/bll demo

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3 --dist worksteal -m "not long"

# What to run while one works: in a minute.
test-fast: setup
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3 --dist worksteal -m "not long and not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# What `make test` leaves out: the long tests, and then failures of runs over processes at length.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m long
	$(BIN)/python tests/faults.py

# The examples with Lightning, transformers, ONNX and others, which are installed for it: some 400 MB.
frameworks: .venv/frameworks-installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -rs -n 3 tests/test_frameworks.py tests/test_event_log.py tests/test_model_sources.py

# The site, into site/. Nothing is fetched while it is built, and a warning is an error.
docs: .venv/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# What the docs say of a GPU, on the one of this machine: at most 25 minutes, and the same command goes on. Name the
# Python that has torch for it: make gpu BIN=/usr/bin
gpu:
	OMP_NUM_THREADS=1 $(BIN)/python3 benchmarks/gpu.py

setup: .venv/installed

# One pip call: with the constraints beside it, pip cannot take another torch first and replace it later. Bytecode is
# made of what is imported alone, which takes half the time.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 with pip found; name one: make PYTHON=python3.11" >&2; exit 2; }
	@echo "setting up .venv, which takes some minutes" >&2
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-compile --constraint constraints.txt pip --editable '.[lab,dev]'
	@touch $@

.venv/frameworks-installed: .venv/installed
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-compile --constraint constraints.txt --editable '.[frameworks]'
	@touch $@

.venv/docs-installed: .venv/installed
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --no-compile --constraint constraints.txt --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv site dist .pytest_cache .ruff_cache .hypothesis
