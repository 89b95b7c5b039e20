# `make` or `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-long test-oldest test-trainers fuzz check docs page demo bench gpu-evidence clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.installed-test ## make .venv and install the package with what the tests need

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
test: setup ## run the tests, a process for each core
	$(PYTEST) -m "not long"

test-long: setup ## run the tests that `make test` leaves out: the same checks at a size of minutes, or compiled
	$(PYTEST) -m long

test-oldest: ## run the tests with the oldest version of each package that pyproject.toml allows (in build/oldest)
	scripts/test-oldest $(TESTS)

test-trainers: ## train in axolotl, LLaMA-Factory, ms-swift and TRL, each in an environment in build/trainers
	scripts/test-trainers $(TRAINERS)

MINUTES ?= 10
fuzz: setup ## read damaged files of each kind, MINUTES of them a target (10), each with a limit of time and memory
	OMP_NUM_THREADS=1 RANKPILOT_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest tests/fuzz -m fuzz -s

check: $(VENV)/.installed-dev ## lint, format, types, import rules and size
	scripts/check

docs: $(VENV)/.installed-docs ## make the pages of docs/ in build/docs, where a browser opens index.html
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --nitpicky --quiet -d build/doctrees docs build/docs
	@echo "The pages are in build/docs/index.html."

page: $(VENV)/.installed-test ## write build/memory.html, the page that tells what fits a card
	@$(BIN)/python -m tools.make_page

SEEN := runs/demo
DEMO := all-minilm-l6-v2 rotten-tomatoes --max-steps 60 --per-device-train-batch-size 16 --max-length 48 --held-out-rows 400 --eval-steps 20 --resume
demo: $(VENV)/.installed-demo ## an 8B on a card, its steps in parts, a fine-tune beside plain LoRA, memory that is taken away, a policy trained, the page of what fits (goes on where it was interrupted)
	$(BIN)/rankpilot memory llama-3.1-8b --device-memory 24GiB --output $(SEEN)/memory
	$(BIN)/rankpilot memory llama-3.1-8b --device-memory 24GiB --batch-size 4 --max-length 2048 --lengths examples/lengths.txt --output $(SEEN)/parts
	$(BIN)/rankpilot finetune $(DEMO) --goal bytes --compare-all-linear --output $(SEEN)/saves
	$(BIN)/rankpilot finetune $(DEMO) --budget "1MiB step" --output $(SEEN)/small 2>&1 | tee $(SEEN)/too-small.txt
	$(BIN)/python -m benchmarks elastic --quick --json $(SEEN)/elastic.json
	$(BIN)/rankpilot policy train --rounds 3 --warm-rounds 1 --stacks 1 --episodes 16 --steps 40 --validation-tasks 1 --output $(SEEN)/policy --resume
	$(BIN)/rankpilot finetune $(DEMO) --policy agent --budget "20k params" --output $(SEEN)/steered
	$(BIN)/rankpilot study $(SEEN)/steered --output $(SEEN)/study.html
	$(BIN)/python -m tools.make_page --output $(SEEN)/memory.html --models llama-3.1-8b qwen3-8b mistral-7b-v0.3 smollm2-135m gpt-oss-20b
	$(BIN)/python -m tools.demo $(SEEN)

bench: setup ## measure what a step costs, how its memory and time are predicted
	$(BIN)/python -m benchmarks overhead --json runs/bench/overhead.json
	$(BIN)/python -m benchmarks step-time --json runs/bench/step_time.json
	$(BIN)/python -m benchmarks memory --json runs/bench/memory.json

gpu-evidence: setup ## on a CUDA card of 24 GiB: predict and measure peaks, times and more, in 40 minutes at most (DRY=--dry-run: on the CPU)
	$(BIN)/python -m benchmarks gpu-evidence $(DRY)

clean: ## remove .venv, build output and caches (keeps runs/)
	rm -rf $(VENV) build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { \
	    echo "No $(PYTHON) found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "$$($(PYTHON) --version) is too old: 3.11 or newer is needed. Name one: make PYTHON=python3.12"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "The venv module failed (on Debian: apt-get install python3-venv)."; rm -rf $(VENV); exit 1; }

# A stamp is older than pyproject.toml after a change of it: only then pip runs again.
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing rankpilot[$*] into $(VENV) (the first time downloads PyTorch: some minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@
	@echo "Installed."
