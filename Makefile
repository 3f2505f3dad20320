# Nothing has to be typed before any of these: the first one sets up .venv from constraints.txt.
#   make demo        unlearn a small model on the CPU, from start to figures      (ARGS="..." is passed on, everywhere)
#   make experiment  TOFU unlearning on the CPU: forget quality against utility (ARGS="--data_dir DIR ..."; hours in full)
#   make test        the test suite, without a GPU (Triton kernels run in the interpreter)
#   make lint        ruff check and ruff format --check
#   make bench       the benchmarks of a CPU; ARGS="run --suite head" and others on a GPU
#   make gpu-check   the tests that need a GPU
#   make env         versions and devices, for an issue report

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=

PY    := .venv/bin/python
STAMP := .venv/.installed
# Through the environment, so that isolated builds obey the pins as well (new pips read the second name for those).
PIP   := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt \
         PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip

.PHONY: help demo experiment test lint format bench gpu-check env clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	$(PY) -m training.demo $(ARGS)

experiment: $(STAMP)
	$(PY) -m training.experiment $(ARGS)

# One thread a worker: the arrays are small, and workers that each take all cores only slow each other down.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m bench $(or $(ARGS),run --suite cpu)

gpu-check: $(STAMP)
	NPO_GPU_TESTS=1 $(PY) -m pytest tests/gpu -rs $(ARGS)

env: $(STAMP)
	@$(PY) -m npo_kernels.env $(ARGS)

# The stamp is written last and removed first. A .venv without one is the rest of an interrupted installation: start afresh.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    f"Python 3.11 or newer is needed and $(PYTHON) is {v[0]}.{v[1]}; say which, as in: make test PYTHON=python3.12")'
	@test -e $@ || rm -rf .venv
	@rm -f $@
	$(PYTHON) -m venv .venv
	$(PIP) install -e '.[dev]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
