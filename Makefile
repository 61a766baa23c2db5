# Every target sets up what it needs in .venv, once; `make demo` is a good first command.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test fast machine mutants newest lint format bench clean

help: ## what there is
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/.demo ## train on real data with both backends (installs once, then a minute)
	$(BIN)/ema demo

test: .venv/.dev ## the whole test suite, and which branches of ema it reaches
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -n 2 --dist worksteal
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

fast: .venv/.dev ## one case of each test that takes a moment: under 90 seconds
	$(BIN)/python -m pytest -n 2 --dist worksteal --fast

machine: .venv/.dev ## long random sequences of calls, new ones each time (up to an hour)
	EMA_MACHINE_EXAMPLES=$${EMA_MACHINE_EXAMPLES:-2000} EMA_MACHINE_STEPS=$${EMA_MACHINE_STEPS:-30} \
		$(BIN)/python -m pytest -n 2 --dist worksteal -rP \
		tests/torch_backend/test_machine.py tests/jax_backend/test_machine.py

mutants: .venv/.dev ## change the equations one number at a time: does a test notice?
	OMP_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.mutants

newest: ## the bits under the newest JAX: make newest PYTHON=python3.13
	$(PYTHON) -m venv .newest
	.newest/bin/python -m pip install --quiet --upgrade jax optax numpy xxhash
	PYTHONPATH=. .newest/bin/python tests/jax_backend/newest.py

lint: .venv/.dev ## ruff, mypy, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.dev ## let ruff rewrite the layout
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.dev ## ours, the peers and the limit of this machine, in turn in one process
	$(BIN)/python -m benchmarks

.venv/.python:
	@echo "creating .venv"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

.venv/.demo: .venv/.python pyproject.toml constraints.txt
	@echo "installing ema and both frameworks into .venv (a minute or two, about 2 GB)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all]"
	@touch $@

.venv/.dev: .venv/.demo
	@echo "installing what the tests and the benchmarks need"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev
	@# alone: it requires torchvision, which would bring a torch of its own
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps timm
	@touch $@

clean: ## remove .venv and caches
	rm -rf .venv .newest .mypy_cache .ruff_cache .pytest_cache .hypothesis
