# Needs Python >= 3.11 and make; the rest is installed into .venv. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo tables test
demo: .venv/installed
	$(BIN)/gdro demo

# The methods side by side, hours: the table goes into the README, its figures and plots beside it. It resumes.
tables: .venv/installed
	$(BIN)/gdro compare --out runs/bench --results benchmarks/results/bench.json --readme README.md --pictures docs

test: .venv/installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q

# The stamp: installed anew when the dependencies change, not at every call.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("gdro needs Python 3.11 or newer, found %d.%d" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
