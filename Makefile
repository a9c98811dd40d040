# Every target makes the environment it needs. CI and users run the same lines.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH ?= torch==2.13.0
PYTHON_FILES := src tests benchmarks docs

.PHONY: demo test test-gpu bench-quick lint format clean

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]" triton
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/flashspec generate --compare "Write a Python function that checks whether a word is a palindrome, then explain it."

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --cov --cov-report=term tests

# On a machine with a GPU, in an environment whose torch has CUDA: make test-gpu TORCH=torch
test-gpu: $(STAMP)
	@$(BIN)/python -c "import sys, torch; torch.cuda.is_available() or \
		sys.exit(f'make test-gpu needs a CUDA device, and torch {torch.__version__} finds none here')"
	$(BIN)/python -m pytest tests/gpu tests/unit/test_kernels*.py

lint: $(STAMP)
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)

bench-quick: $(STAMP)
	$(BIN)/flashspec bench endtoend --limit 4 --max-new-tokens 64 --output build/bench-quick.json

clean:
	rm -rf $(VENV) build dist .coverage .mypy_cache .ruff_cache .pytest_cache
