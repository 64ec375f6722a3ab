# make demo: set up a virtual environment and migrate the example fleet.   make test: set up and run every test.
PYTHON ?= python3
VENV   ?= .venv
RUN    ?= runs/demo
BIN    := $(VENV)/bin
AUDIT  := .venv-audit
STAMP  := $(VENV)/.translora-setup

# Idle worker threads sleep instead of spinning: several processes share the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: setup bases tasks bundles demo report lint test audit clean

setup: $(STAMP)

# torch comes first and alone: resolved together with the rest, pip may choose another build and fetch gigabytes.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	touch $@

bases: setup
	$(BIN)/python -m examples.bases

tasks: setup
	$(BIN)/python -m examples.tasks

bundles: bases tasks
	$(BIN)/python -m translora prepare examples/prepare.yaml

demo: bases tasks
	$(BIN)/python -m translora migrate examples/fleet.yaml

report: setup
	$(BIN)/python -m translora report $(RUN)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: bases lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10 -n 2 --dist loadfile tests/unit tests/bad_inputs
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -q --durations=15 -n 2 --dist loadfile tests/integration

# In an environment of its own: what is audited must not be what audits. Writes one line where PyPI cannot be reached.
audit:
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && \
	    $(AUDIT)/bin/python -m pip install -q --disable-pip-version-check pip-audit==2.10.1; }
	@$(PYTHON) -m tests.audit $(AUDIT)/bin/pip-audit

clean:
	rm -rf $(VENV) $(AUDIT) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
