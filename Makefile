# Needs Python >= 3.11 and make; the rest is installed into .venv. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
OTHER_PROCESSOR := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile
TESTS := tests/models tests/objectives tests/samplers tests/training

.PHONY: demo tables lint fast test numerics lowest
demo: .venv/installed
	$(BIN)/gdro demo

# The methods side by side, for hours: tables into docs/results.md, figures and plots beside them. It resumes.
tables: .venv/installed
	$(BIN)/gdro compare --out runs/comparison --results benchmarks/results/comparison.json --readme docs/results.md --pictures docs

lint: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

# While working, a minute: no processes, no whole runs, nothing that takes seconds.
fast: .venv/installed
	$(PYTEST) -m "not slow"

test: lint
	$(PYTEST)

# What computes, once more as a processor with other instructions would round it. All of it: make numerics TESTS=tests
numerics: .venv/installed
	$(OTHER_PROCESSOR) $(PYTEST) $(TESTS)

# The same on the lowest versions that pyproject.toml allows, laid over those of .venv.
lowest: .lowest/installed
	$(OTHER_PROCESSOR) PYTHONPATH=$(CURDIR)/.lowest $(PYTEST) $(TESTS)

# The stamp: installed anew when the dependencies change, not at every call.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("gdro needs Python 3.11 or newer, found %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.lowest/installed: .venv/installed constraints-lowest.txt
	rm -rf .lowest
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .lowest -r constraints-lowest.txt
	@touch $@
