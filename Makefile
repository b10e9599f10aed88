# Needs Python >= 3.11 and make; the rest is installed into .venv. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile
NUMERICS := tests/models tests/objectives tests/samplers tests/training
TESTS := tests/models tests/samplers tests/groups tests/stages tests/rewards

.PHONY: demo tables test numerics lowest
demo: .venv/installed
	$(BIN)/gdro demo

# The methods side by side, hours: the table goes into the README, its figures and plots beside it. It resumes.
tables: .venv/installed
	$(BIN)/gdro compare --out runs/bench --results benchmarks/results/bench.json --readme README.md --pictures docs

test: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(PYTEST)

# What computes, once more as a processor with other instructions would round it.
numerics: .venv/installed
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=AVX2 $(PYTEST) $(NUMERICS)

# On the lowest versions that pyproject.toml allows, laid over those of .venv. All of it: make lowest TESTS=tests
lowest: .lowest/installed
	PYTHONPATH=.lowest $(PYTEST) $(TESTS)

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
