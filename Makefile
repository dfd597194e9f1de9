# The whole developer interface. Every target builds what it needs; a fresh machine needs Python 3.11 to 3.13 and no more.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
# Threads of the tests' own processes would fight over the cores with pytest-xdist's.
TEST_ENV := OMP_NUM_THREADS=1

.PHONY: install demo test lint types layers size parity bench bench-cli bench-serve docs clean help
help:
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 12

install: $(READY)  ## the development environment in .venv
$(READY): pyproject.toml constraints.txt packages/manipi-client/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e packages/manipi-client -e '.[dev]'
	@touch $(READY)

demo: $(READY)  ## record, train, serve, drive, report (about ten minutes on two cores)
	$(BIN)/manipi demo

test: $(READY) lint types layers size  ## everything that has to hold before a commit
	$(TEST_ENV) $(BIN)/python -m pytest -q -n auto --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/pyright --warnings

layers: $(READY)
	$(BIN)/lint-imports --no-cache

size: $(READY)  ## lines per room, and the house's budgets
	$(BIN)/python benchmarks/size.py

parity: $(READY)  ## every golden case of the reference, as a table (MANIPI_GOLDEN=folder:folder for others)
	$(TEST_ENV) $(BIN)/python -m pytest -q --no-header --show-capture=no --tb=short -r fE tests/parity

bench: bench-cli bench-serve  ## every benchmark: a table, and as its last line one JSON object each

bench-cli: $(READY)  ## how long the command line takes to answer
	$(BIN)/python benchmarks/bench_cli.py

bench-serve: $(READY)  ## what the server adds to the bare policy call
	$(BIN)/python benchmarks/bench_serve.py

docs: $(READY)  ## check that the documentation's links, commands and file tree are true
	$(BIN)/python -m pytest -q tests/docs

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
