# Everything starts from a fresh clone: each target sets up what it needs and skips what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ASSETS := .cache/assets/.complete

.PHONY: run test check bench lock clean

run: $(INSTALLED)  ## set up, then answer a question from the example documents and keep serving
	$(BIN)/lq demo $(DEMO)

test: $(INSTALLED) $(ASSETS)  ## set up, fetch the pinned test weights, run every test
	$(BIN)/python -m pytest $(ARGS)

check: $(INSTALLED)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(INSTALLED) $(ASSETS)  ## speed against llama-server of the same commit, alternating runs
	$(BIN)/python -m benchmarks.single_stream $(ARGS)

$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(ASSETS): tests/assets.toml tests/fetch_assets.py $(INSTALLED)
	$(BIN)/python tests/fetch_assets.py .cache/assets
	touch $@

lock:  ## resolve pyproject.toml anew into requirements.lock
	$(PYTHON) -m venv .cache/lock && .cache/lock/bin/pip install -q uv
	.cache/lock/bin/python scripts/lock.py

clean:
	rm -rf $(VENV) .cache
