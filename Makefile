# What one types in a checkout lives here: set-up, demo, tests, checks. A step longer than a line or two belongs in a
# Python file; what a tool should do belongs in pyproject.toml.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
TESTED := runs/logs/digits/test/metrics.csv

# A worker a core; the tests of a file share what it sets up, and so a worker.
WORKERS ?= 2

# One thread a process: the stages are the parallelism.
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test check clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --editable '.[recipes,dev]'
	touch $@

demo: $(INSTALLED)  ## train the digits recipe in two processes and test it
	$(BIN)/python -m lightning_ddg fit --config recipes/digits.yaml
	$(BIN)/python -m lightning_ddg test --config recipes/digits.yaml --ckpt_path runs/digits/best.ckpt \
		--trainer.logger.init_args.version test
	@$(BIN)/python -c 'import csv; acc = float(next(csv.DictReader(open("$(TESTED)")))["test_acc"]); \
		assert acc >= 0.95, f"test accuracy {acc:.4f} is below 0.95: see $(TESTED)"; print(f"test accuracy {acc:.4f}")'

test: $(INSTALLED)  ## run the tests (the slow ones: .venv/bin/python -m pytest -m slow)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: $(INSTALLED)  ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy --strict lightning_ddg

clean:  ## remove caches and build products (.venv and runs stay)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find lightning_ddg recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
