# Two commands do everything on a fresh machine: `make lab` to learn, `make test` to verify.
# TORCH=cpu takes PyTorch's CPU build on Linux; PYTHON=python3.12 chooses the interpreter.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help lab test test-cpus env model sync exercises book bench bench-suite lint lock clean

help: ## what each command does
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

lab: env ## open the course in JupyterLab (the first time: makes the environment, fetches the real model)
	@$(BIN)/llmlab model fetch || echo "Going on without the real model; lessons that need it will say so."
	@$(BIN)/llmlab lab

test: env ## run everything that CI runs
	@$(BIN)/python scripts/verify.py

test-cpus: env ## the methods' tests and lessons as other CPUs run them: DAY=1 for today's part
	@$(BIN)/python scripts/test_cpus.py $(if $(DAY),--today)

env: ## make or refresh .venv from requirements.lock
	@$(PYTHON) scripts/environment.py

model: env ## fetch the real model (98 MB, once)
	@$(BIN)/llmlab model fetch

sync: env ## after editing a lesson's .py: update its .ipynb and execute what changed
	@$(BIN)/python -m llmlab.course.sync

exercises: env ## after editing a solution: make its exercise notebook anew
	@$(BIN)/python -m llmlab.course.exercises

book: env ## build the book into jupyter-book/_build/html
	@$(BIN)/python -m llmlab.course.book.build

bench: env ## our code against the libraries, side by side
	@$(BIN)/python -m benchmarks.run

bench-suite: env ## `make test` before and after a change, side by side
	@$(BIN)/python -m benchmarks.suite

lint: env ## ruff, as CI runs it
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

lock: env ## write requirements.lock and environment.yml from what is installed
	@$(BIN)/python scripts/lock.py

clean: ## remove what was built; your work/ and the environment stay
	rm -rf jupyter-book/_build build dist .pytest_cache .ruff_cache .coverage*
