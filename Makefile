# Needs Python 3.11 or 3.12 with pip, and make: `make demo` and `make test` do all the set-up themselves.
SUPPORTED = import sys, venv, pip; sys.exit(not (3, 11) <= sys.version_info < (3, 13))
PYTHON ?= $(firstword $(foreach p,python3 python python3.12 python3.11,$(shell $(p) -c "$(SUPPORTED)" 2>/dev/null && echo $(p))))
BIN = .venv/bin

.PHONY: demo test faults gpu setup clean

demo: setup
	$(BIN)/bll demo

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 3 --dist worksteal -m "not long"

# What `make test` leaves out, in a short form and then at length: some 15 minutes.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -m long
	$(BIN)/python tests/faults.py

# What the docs say of a GPU, on the one of this machine: at most 25 minutes, and the same command goes on. Name the
# Python that has torch for it: make gpu BIN=/usr/bin
gpu:
	OMP_NUM_THREADS=1 $(BIN)/python3 benchmarks/gpu.py

setup: .venv/installed

# One pip call: with the constraints beside it, pip cannot take another torch first and replace it later.
.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or 3.12 with pip found; name one: make PYTHON=python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --constraint constraints.txt pip --editable '.[lab,dev]'
	@touch $@

clean:
	rm -rf .venv dist .pytest_cache .ruff_cache .hypothesis
