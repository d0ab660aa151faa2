# Needs Python 3.11 or newer and make; everything else is installed into $(VENV).
# Another interpreter: make quickstart PYTHON=/path/to/python3.12

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
QUICKSTART ?= run gin/experiments/digits.gin

py := $(VENV)/bin/python
plain := $(VENV)/.installed
dev := $(VENV)/.installed-dev
mutmut := $(VENV)/.installed-mutmut

export MLFLOW_DISABLE_TELEMETRY = true
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help quickstart install test test-all test-faults soak plan-check method-pages test-browser check fmt wheel clean mutants
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install, then compare the five objectives on the 8x8 digits"
	@echo "make test         the tests, without the slow ones"
	@echo "make test-all     all tests"
	@echo "make plan-check   what the planner predicts beside the memory of processes (minutes)"
	@echo "make method-pages write docs/methods from the code and from what was measured"
	@echo "make test-browser the report's page in the Chromium on the PATH"
	@echo "make test-faults  kill, starve and interrupt runs of several processes (minutes)"
	@echo "make soak         6,000 steps in two processes, whose memory and files must not grow"
	@echo "make check        ruff, mypy and the import directions"
	@echo "make mutants      plant mistakes in the mathematics and list those that no test notices"
	@echo "make fmt          let ruff format and repair"
	@echo "make install      the package with its development tools, editable, in $(VENV)"
	@echo "make wheel        dist/objective_zoo-*.whl"
	@echo "make clean        remove caches and dist/; keeps $(VENV) and runs/"

quickstart: $(plain)
	$(VENV)/bin/objective-zoo $(QUICKSTART)

install: $(dev)

test: $(dev)
	OMP_NUM_THREADS=1 $(py) -m pytest -n 2 --dist loadfile -m "not slow and not browser and not faults"

test-faults: $(dev)
	OMP_NUM_THREADS=1 $(py) -m pytest -m faults

soak: $(dev)
	for stage in 2 3; do OMP_NUM_THREADS=1 $(py) tests/support/soak.py $$stage || exit 1; done

test-all: $(dev)
	$(py) -m pytest

# What the planner predicts beside the memory of processes: minutes.
plan-check: $(dev)
	OMP_NUM_THREADS=1 $(py) -m torch.distributed.run --standalone --nproc_per_node 2 -m benchmarks.plan_check

# RUNS='runs/mixture runs/zoo_digits' takes results from there, BENCH=FILE costs, CHECK=1 checks anew.
method-pages: $(dev)
	$(py) -P -m benchmarks.method_pages $(if $(RUNS),--runs $(RUNS)) $(if $(BENCH),--bench $(BENCH)) $(if $(CHECK),--check)

test-browser: $(dev)
	@command -v chromium >/dev/null || { echo "The page is tested in Chromium, which is not on the PATH." \
		"Debian: apt install chromium"; exit 1; }
	$(py) -m pip install -q -e '.[browser]'
	$(py) -m pytest -m browser

check: $(dev)
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	$(py) -m mypy
	$(py) -m pytest -q tests/test_layering.py

# MUTANTS='zoo.times.*' runs one module. Survivors are shown, and kept in mutants/survivors.txt.
mutants: $(mutmut)
	OMP_NUM_THREADS=1 $(VENV)/bin/mutmut run $(if $(MUTANTS),'$(MUTANTS)')
	@for name in $$($(VENV)/bin/mutmut results | sed -n 's/^ *\(.*\): survived$$/\1/p'); do \
		$(VENV)/bin/mutmut show "$$name"; done | tee mutants/survivors.txt
	@$(VENV)/bin/mutmut results --all true | sed 's/^ *\(.*\)\.x.*: /\1 /' | sort | uniq -c

fmt: $(dev)
	$(py) -m ruff format .
	$(py) -m ruff check --fix .

wheel: $(dev)
	$(py) -m hatchling build -t wheel

clean:
	rm -rf build dist mutants *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(wildcard registry zoo backbones trainers benchmarks tests) -name __pycache__ -prune -exec rm -rf {} +

$(py):
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed, and none is on the PATH" \
		"(python3 is $$(python3 --version 2>&1)). Install one, or: make PYTHON=/path/to/python"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or newer is needed; $(PYTHON) is $$($(PYTHON) --version 2>&1)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make a virtual environment. Debian, Ubuntu: apt install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(plain): pyproject.toml | $(py)
	@echo "Installing the package and what it needs (PyTorch is large: minutes, 6 GB)"
	$(py) -m pip install -e .
	@touch $@

$(dev): pyproject.toml | $(py)
	@echo "Installing the package, what it needs and the development tools (minutes, 6 GB)"
	$(py) -m pip install -e '.[dev]'
	@touch $(plain) $@

$(mutmut): pyproject.toml | $(dev)
	$(py) -m pip install -e '.[dev,mutants]'
	@touch $@
