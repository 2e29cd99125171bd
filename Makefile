# make demo    the whole story on this machine: demonstrations, training, a policy that acts, a page that shows it
# make test    lint, types and the fast tests
# make test-slow    the tests that make test leaves out; the CI runs both, one after the other
# make test-isa     the fast tests under the instruction sets of other processors, and with 1 and 2 threads
# The first call makes .venv with plain pip; later calls reuse it until a pyproject.toml or the requirements change.
#
# PYTHON=python3.12   the interpreter for .venv (3.11 to 3.13)
# PIP_ARGS=...        more words for pip install, e.g. --extra-index-url with PyTorch's CPU wheels where the default
#                     ones would bring CUDA
# ARGS=...            more words for the verb or for pytest, e.g. make demo ARGS=--quick

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
VENV ?= .venv
JOBS ?= 2
PYTHON312 ?= python3.12
LEROBOT ?= .venv-lerobot
OPENPI ?= .venv-openpi
RELEASE ?= .venv-release
CHECK := plugins/datasets/lerobot/interop/check.py
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

.PHONY: install demo test test-slow test-all test-isa lint format bench interop interop-serve release-check smoke clean

install: $(STAMP)

$(STAMP): requirements-dev.txt $(wildcard core/pyproject.toml plugins/*/*/pyproject.toml clients/*/pyproject.toml)
	@test -n "$(PYTHON)" || { echo "no Python found: install Python 3.11, 3.12 or 3.13"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "$(PYTHON) is not Python 3.11 to 3.13; choose one: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "hatchling>=1.24" "editables>=0.5"
	$(PIP) --no-build-isolation -r requirements-dev.txt
	@# MuJoCo needs some OpenGL to draw: EGL or OSMesa of the system, else a wheel that brings one (see its own error).
	@$(BIN)/python -m vla_dataset_tabletop.rendering >/dev/null 2>&1 || $(PIP) --no-deps lavavu-osmesa
	@touch $@

demo: $(STAMP)
	$(BIN)/vla demo $(ARGS)

# One thread per process: JOBS test processes share the machine. loadgroup: the conformance checks of one part, which
# share compiled models, stay in one process.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m "not slow" $(ARGS)

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m slow $(ARGS)

test-all: test test-slow

# No computed float is the same on every processor. ARGS="-m slow" for the others.
test-isa: $(STAMP)
	PYTHON=$(BIN)/python sh scripts/test-isa $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix --quiet .
	$(BIN)/ruff format --quiet .

bench: $(STAMP)
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file $(ARGS) || exit 1; done

# Both directions against LeRobot itself (0.6.1 needs Python 3.12 and another torch: an environment of its own, 6 GB),
# then the exact numbers of openpi and LeRobot (VLA_SHARED and VLA_GOLDENS say where they are; default ../shared).
interop: $(STAMP)
	test -x $(LEROBOT)/bin/python || $(PYTHON312) -m venv $(LEROBOT)
	$(LEROBOT)/bin/python -m pip install --quiet --disable-pip-version-check "lerobot[dataset]==0.6.1"
	rm -rf $(LEROBOT)/sets && mkdir $(LEROBOT)/sets
	$(BIN)/python $(CHECK) write $(LEROBOT)/sets
	$(LEROBOT)/bin/python $(CHECK) lerobot $(LEROBOT)/sets
	$(BIN)/python $(CHECK) compare $(LEROBOT)/sets
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup -m goldens $(ARGS)

# A dry run of a release: versions, wheels built twice with equal bytes, metadata, bill of materials, licences. Uploads nothing.
release-check: $(RELEASE)/.installed
	$(RELEASE)/bin/python scripts/release_check.py $(ARGS)

# Every verb from wheels in a fresh environment: make smoke FRAMEWORK=torch (or jax, both, neither)
smoke: $(RELEASE)/.installed
	PIP_ARGS="$(PIP_ARGS)" $(RELEASE)/bin/python scripts/smoke.py --framework $(or $(FRAMEWORK),torch) --python $(PYTHON) $(ARGS)

$(RELEASE)/.installed:
	$(PYTHON) -m venv $(RELEASE)
	$(RELEASE)/bin/python -m pip install --quiet --disable-pip-version-check "hatchling>=1.24" "twine>=6" "cyclonedx-bom>=5" "pip-licenses>=5"
	@touch $@

# The real openpi-client against our server, ours against its framing (it needs numpy below 2: its own environment).
interop-serve: $(STAMP)
	test -x $(OPENPI)/bin/python || $(BIN)/python -m venv $(OPENPI)
	$(OPENPI)/bin/python -m pip install --quiet --disable-pip-version-check openpi-client==0.1.2 typing_extensions
	VLA_OPENPI_CLIENT=$(abspath $(OPENPI))/bin/python $(BIN)/python -m pytest -q tests/test_serving_clients.py $(ARGS)

clean:
	rm -rf $(VENV) $(LEROBOT) $(OPENPI) $(RELEASE) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
