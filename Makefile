# Two commands do everything on a fresh machine: `make test` and `make demo`. They need make, Python 3.11+, pip and npm.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo demo-short eval-demo bench test test-fast test-lowest check docs dist format clean

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: $(STAMP) ## run the whole recipe on a miniature: real weights, real images, report with pictures
	$(BIN)/python examples/emoji_demo.py

demo-short: $(STAMP) ## the same in a few steps, to see that it runs; its numbers mean nothing
	$(BIN)/python examples/emoji_demo.py --short --output demo_output_short

eval-demo: $(STAMP) ## evaluate the miniature on the whole emoji benchmark; again from the cache, in seconds
	$(BIN)/python examples/emoji_demo.py --evaluate

bench: $(STAMP) ## all speed benchmarks against their peers, some hours; some: make bench BENCH="encode parts"
	$(BIN)/python benchmarks/bench.py $(BENCH)

test: $(STAMP) ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-fast: $(STAMP) ## tests without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-lowest: $(STAMP) ## the fast tests on the lowest versions that pyproject.toml allows, in an environment of its own
	$(BIN)/python -m uv venv --quiet --clear --python $(BIN)/python $(VENV)-lowest
	$(BIN)/python -m uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct \
		--editable '.[eval,train,ann,b3,qdrant,lancedb,serve,smolvlm,video,pdf,demo]'
	$(BIN)/python -m uv pip install --quiet --python $(VENV)-lowest/bin/python pytest pytest-xdist httpx playwright deepspeed
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow" --ignore=tests/docs

check: $(STAMP) ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP) ## build the site into site/, warnings and broken links being errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

dist: $(STAMP) ## build wheel and source distribution, and try each in an environment of its own
	rm -rf dist build
	$(BIN)/python -m build --outdir dist
	$(BIN)/python .ci/check_dist.py dist

format: $(STAMP) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove what the demo and the tools made
	rm -rf site dist build demo_output demo_output_short .demo_cache .mypy_cache .ruff_cache .pytest_cache
