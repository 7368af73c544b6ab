# make demo       train three small models on an embedded corpus, in minutes, and write demo/report.html
# make test       every test but those marked `long` (at most 15 minutes on 2 cores)
# make test-fast  tests that start no processes of their own (at most 4 minutes)
# make test-all   every test
# make test-versions  test-fast on every Python found, and on the oldest and newest torch and transformers
# make lint       ruff, import layers, spelling, words, types, structure
# make gpu-check  acceptance on one GPU, at most 400 s (DEVICE=cpu SMALL=1: every check, small, on a CPU)
# make gpu-check-bundle  what a GPU machine without a package index needs, in .gpu
# make results    tables, charts and diagrams of the docs, from docs/results and code
# make docs       the docs site, in site/; fails on a broken link
# make api        compare the public Python API with its snapshot, and renew it
# make dist       wheel and sdist in dist/, byte for byte reproducible
# make lock       constraints.lock: the tested versions with the hashes of their files
# make audit      known vulnerabilities of the installed packages, and their list (SBOM) in dist/sbom.json
# make clean      remove the demo (which reuses finished steps even after a change of the code) and caches
#
#   make demo PYTHON=python3.12          another interpreter for .venv
#   make setup PIP_FLAGS='--index-url …' another package source, e.g. for a CPU or a particular CUDA build of torch
#   make test PYTEST_FLAGS='-k slurm'    a part of the suite
#   make gpu-check ONLY='strategies compile'    other checks

PYTHON ?= python3
PIP_FLAGS ?=
PYTEST_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt $(PIP_FLAGS)
# Two files at a time: much of a test's time is waiting for ranks, jobs and imports. A later `-n 0` in PYTEST_FLAGS wins.
PYTEST := $(BIN)/python -m pytest -q -n 2 --dist loadfile

.PHONY: help setup demo test test-fast test-long test-all test-versions soak gpu-check gpu-check-bundle results docs docs-serve api dist lock audit lint format clean distclean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

setup: $(STAMP)

# A changed setup.cfg or constraints.txt means a new install; anything else leaves .venv as it is.
$(STAMP): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "setup: $(PYTHON) is older than Python 3.10: name a newer one, e.g. make setup PYTHON=python3.11" >&2; exit 2; }
	@rm -f $(STAMP)
	$(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja torch
	# DeepSpeed comes as source and looks at torch while it is built, so no isolated build; DS_BUILD_OPS=0: no compiler needed.
	DS_BUILD_OPS=0 $(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation --editable '.[mpi,dask,fast,s3,near-duplicates,lang,serve,engines,report,eval,lm-eval,import,research,segmentation-benchmark,docs,dev]'
	@touch $(STAMP)
	@echo "setup: done; next: . $(BIN)/activate && make demo, or docs/tutorials/cpu.md"

demo: $(STAMP)
	$(BIN)/python -m tools.demo.run

test: $(STAMP)
	$(PYTEST) -m 'not long' $(PYTEST_FLAGS)

test-fast: $(STAMP)
	$(PYTEST) -m 'not long and not launch' $(PYTEST_FLAGS)

test-long: $(STAMP)
	$(PYTEST) -m long --durations=0 $(PYTEST_FLAGS)

test-all: test test-long

test-versions: $(STAMP)
	$(BIN)/python -m tools.versions $(VERSIONS)

soak: $(STAMP)
	PYTHONPATH=. $(BIN)/python tests/soak.py --output docs/results/soak.json

gpu-check: $(STAMP)
	$(BIN)/python -m tools.gpu_check run --output gpu-check --device $(or $(DEVICE),cuda) \
	  $(if $(SMALL),--small) $(if $(ONLY),--only $(ONLY))

gpu-check-bundle: $(STAMP)
	$(BIN)/python -m tools.gpu_check bundle --output .gpu

results: $(STAMP)
	$(BIN)/python -m tools.docs.tables
	$(BIN)/python -m tools.docs.configuration
	$(BIN)/python -m tools.docs.pictures

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

api: $(STAMP)
	$(BIN)/python -m tools.release.api

dist: $(STAMP)
	$(BIN)/python -m tools.release.dist

# Tools that look at .venv from outside, so that they add nothing to it.
.audit/.complete:
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip --disable-pip-version-check install --quiet $(PIP_FLAGS) uv pip-audit cyclonedx-bom
	@touch $@

# torch is left out: its build depends on the machine.
lock: .audit/.complete
	grep -v '^#\|^torch==' constraints.txt | .audit/bin/uv pip compile - --no-deps --generate-hashes --quiet \
	  --custom-compile-command 'make lock' --no-annotate --python-version 3.11.7 --output-file constraints.lock

audit: .audit/.complete $(STAMP)
	@mkdir -p dist
	.audit/bin/cyclonedx-py environment $(BIN)/python --output-reproducible --output-file dist/sbom.json
	grep -v '^#' constraints.txt > .audit/constraints.txt
	.audit/bin/pip-audit --requirement .audit/constraints.txt --no-deps --disable-pip

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python -m tools.check_words
	$(BIN)/mypy
	$(BIN)/python -m tools.structure
	$(BIN)/python -m tools.release.api --check

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf demo site dist build .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis
	find data_prep pipeline tools tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) .audit *.egg-info
