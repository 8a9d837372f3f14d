# Everything starts from a fresh clone: each target sets up what it needs and skips what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
ASSETS := .cache/assets/.complete

.PHONY: run test check bench wheelhouse image lock clean help

run: $(INSTALLED)  ## set up, answer a question from the example documents, keep serving (DEMO=--once: stop after it)
	$(BIN)/lq demo $(DEMO)

test: $(TESTABLE) $(ASSETS)  ## set up, fetch the pinned test weights, run every test (ARGS: for pytest)
	$(BIN)/python -m pytest $(ARGS)

check: $(TESTABLE)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(TESTABLE) $(ASSETS)  ## speed against llama-server of the same commit, alternating (ARGS: see --help)
	$(BIN)/python -m benchmarks.single_stream $(ARGS)

wheelhouse: $(INSTALLED)  ## every package as files, for a build or an installation without a network
	$(PIP) download --quiet --dest wheelhouse --requirement requirements.lock
	$(PIP) download --quiet --dest wheelhouse "scikit-build-core[pyproject]" cmake ninja setuptools wheel

image:  ## build the container image, run it and ask it one question; needs docker, podman or buildah
	scripts/prove_image.sh

lock:  ## resolve pyproject.toml anew into the two locks
	$(PYTHON) -m venv .cache/lock && .cache/lock/bin/pip install --quiet uv
	.cache/lock/bin/python scripts/lock.py

clean:  ## remove what the targets above made; models and collections under LQ_HOME stay
	rm -rf $(VENV) .cache wheelhouse

help:
	@sed -n 's/^\([a-z]*\):.*##/\1:/p' Makefile | column -t -s:

$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(TESTABLE): requirements-dev.lock $(INSTALLED)
	$(PIP) install --requirement requirements-dev.lock
	touch $@

$(ASSETS): tests/assets.toml tests/fetch_assets.py $(TESTABLE)
	$(BIN)/python tests/fetch_assets.py .cache/assets
	touch $@
