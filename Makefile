# From a fresh machine (git, make, Python 3.11 or newer with venv) to results: `make repro`.  GNU make, POSIX sh.

PYTHON ?= python3
PORT ?= 5000
ARGS ?=
RECIPE ?=

BIN := $(CURDIR)/.venv/bin
PIP := .venv/bin/python -m pip --disable-pip-version-check

export PATH := $(BIN):$(PATH)
# Nobody is told what is run here.  MLflow takes only the word true for DO_NOT_TRACK, others take any.
export MLFLOW_DISABLE_TELEMETRY := true
export DO_NOT_TRACK := true
export DVC_NO_ANALYTICS := 1
# Containers often set it; each process would then compile torch, MLflow and DVC again: 12 s instead of 5.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help repro recipe test check-results lint ui bench peers lock environment venv clean
.DEFAULT_GOAL := help

help:
	@echo 'make repro   environment, data, training, images, metrics    (ARGS: of dvc repro; RECIPE: a file of recipes/)'
	@echo 'make test    environment, ruff, mypy, the test suite         (ARGS: of pytest)'
	@echo 'make check-results  the committed results against code, parameters and documentation (ARGS: of pytest)'
	@echo 'make lint    ruff and mypy alone'
	@echo 'make bench   measure it beside other packages; an hour or two (ARGS: of python -m benchmarks, for example training)'
	@echo 'make ui      MLflow on http://127.0.0.1:$(PORT)                   (PORT=5000)'
	@echo 'make lock    requirements.lock from pyproject.toml           (ARGS=--upgrade: newest versions)'
	@echo 'make clean   remove .venv and caches; data, metrics and rows stay'
	@echo
	@echo 'PYTHON=python3.12 names the Python that .venv is made from.'

repro: environment recipe
	@.venv/bin/dvc repro $(ARGS)
	-@.venv/bin/rediffuse sync  # completes the row; a server that is away fails nothing

# A recipe takes the place of params.yaml, but never of settings that are nowhere else.
recipe:
	@test -z '$(RECIPE)' || cmp -s 'recipes/$(RECIPE).yaml' params.yaml || { \
		test -f 'recipes/$(RECIPE).yaml' || { echo 'There is no recipe "$(RECIPE)"; there are:' $(basename $(notdir $(wildcard recipes/*.yaml))) >&2; exit 1; }; \
		git diff --quiet HEAD -- params.yaml || { echo 'params.yaml has changes that are not committed: commit them, or undo them with' \
			'git checkout params.yaml, then run make again.' >&2; exit 1; }; \
		cp 'recipes/$(RECIPE).yaml' params.yaml; }

# One thread for each process: two processes with a thread on each core would wait for one another at every barrier.
test: lint
	@OMP_NUM_THREADS=1 .venv/bin/pytest -n auto --dist loadfile --no-loadscope-reorder $(ARGS)

# Apart from the tests, which an edit leaves green: this asks for a new `make repro` after it.
check-results: environment
	@.venv/bin/pytest tests/check_results.py $(ARGS)

lint: environment
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

ui: environment
	@.venv/bin/rediffuse ui --port $(PORT)

# What it is measured against is installed here only, into the same .venv, where it changes no package of requirements.lock.
bench: environment peers
	@.venv/bin/python -m benchmarks $(ARGS)

peers: environment
	@cmp -s benchmarks/requirements.lock .venv/peers || { \
		$(PIP) install --quiet --require-hashes --no-deps -r benchmarks/requirements.lock && cp benchmarks/requirements.lock .venv/peers; }

# One lock for every platform and every Python from 3.11 on; versions already locked stay, unless ARGS=--upgrade.  The second holds what
# the extra `bench` needs beyond the first; dataclasses, which pythae names, is a part of Python since 3.7.
NOT_AGAIN = $$(sed -n 's/^\([A-Za-z0-9._-]*\)==.*/--no-emit-package \1/p' requirements.lock) --no-emit-package dataclasses
lock: environment
	@.venv/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-annotate --custom-compile-command 'make lock' --quiet --output-file requirements.lock $(ARGS)
	@.venv/bin/uv pip compile pyproject.toml --extra bench --constraints requirements.lock --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --custom-compile-command 'make lock' --quiet $(NOT_AGAIN) \
		--output-file benchmarks/requirements.lock $(ARGS)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# .venv/lock and .venv/project are copies of what was installed, written last: an interrupted installation leaves none and is
# done again, and equal content is not installed twice, whatever the time stamps say.  A moved checkout needs a new .venv.
environment:
	@{ pwd; cat requirements.lock; } | cmp -s - .venv/lock && test -x .venv/bin/python || $(MAKE) --no-print-directory venv
	@cmp -s pyproject.toml .venv/project || { \
		$(PIP) install --quiet --no-deps --no-build-isolation --editable . && cp pyproject.toml .venv/project; }

venv:
	@version=$$($(PYTHON) -c 'import sys; print(sys.version.split()[0]); sys.exit(sys.version_info < (3, 11))' 2>/dev/null) || { \
		echo "Python 3.11 or newer is needed, but $(PYTHON) is $${version:-not there}." >&2; \
		echo "Install one, or name one that is there, for example: make PYTHON=python3.12 repro" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module.  On Debian or Ubuntu: sudo apt-get install python3-venv; then run make again." >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	@$(PIP) install --require-hashes --no-deps --no-compile -r requirements.lock || { \
		echo "The packages of requirements.lock could not be installed; pip says why above.  If the network failed, run make again:" >&2; \
		echo "what was downloaded is not downloaded twice.  Behind a mirror: set PIP_INDEX_URL, or index-url with pip config." >&2; exit 1; }
	@{ pwd; cat requirements.lock; } > .venv/lock
