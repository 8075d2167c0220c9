# Each target first sets up what it needs: a virtual environment with the exact
# versions of requirements.lock and an editable install of the project.
#
#   make demo                          train on the bundled digits and print the table
#   make test lint docs                what CI runs
#   make test PYTHON=python3.12 VENV=.venv312      the same with another Python
#
# Uses the newest working Python, 3.11 or later, unless PYTHON names one.

VENV ?= .venv
CANDIDATES := python3.14 python3.13 python3.12 python3.11 python3 python
SUPPORTED := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in $(CANDIDATES); do \
  $$p -c '$(SUPPORTED)' >/dev/null 2>&1 && echo $$p && break; done)
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test test-all test-tpu lint docs bench lock clean

demo: $(READY)
	workdir=runs/demo-$$(date +%Y%m%d-%H%M%S) && \
	$(RUN) -m lt_jax.main --config=configs/digits_lt.py:ldam_drw --workdir=$$workdir && \
	$(RUN) -m lt_jax.report $$workdir

test: $(READY)
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

# Also runs the slow tests: the same checks for more recipes, devices and moments.
test-all: $(READY)
	$(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder -m ""

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Runs the tutorials, then builds the site. Broken links and missing references fail.
# `docs/site/tutorials.py --figures` also replaces the figures of the tutorials.
docs: $(READY)
	$(RUN) docs/site/tutorials.py
	$(RUN) -m zensical build --strict --clean

# Needs no TPU: the real compiler compiles for one.
test-tpu:
	$(MAKE) VENV=.venv-tpu .venv-tpu/.ready
	.venv-tpu/bin/python -m pip install --quiet --constraint requirements.lock "jax[tpu]"
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest tests/test_tpu.py

bench: $(READY)
	$(RUN) -m benchmarks.train_step --json=benchmarks/results/train_step.json
	$(RUN) -m benchmarks.meta_step --json=benchmarks/results/meta_step.json
	$(RUN) -m benchmarks.memory_head --json=benchmarks/results/memory_head.json
	$(RUN) -m benchmarks.adaptation_step --json=benchmarks/results/adaptation_step.json

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { \
	  echo "lt_jax needs Python 3.11 or newer, with venv; set PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --no-compile --requirement requirements.lock
	$(RUN) -m pip install --quiet --no-deps --editable .
	@touch $@

# The lock is universal: one file for every supported Python and platform.
lock:
	uv pip compile --quiet --universal --python-version 3.11 --extra dev --extra docs --upgrade \
	  --no-emit-index-url --no-annotate --no-header pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) .venv-tpu .pytest_cache .ruff_cache build site *.egg-info
