# Everything starts from a fresh clone: each target sets up what it needs and skips what is there.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where torch comes from, if not from pip's own index: PyTorch's CPU index saves gigabytes of CUDA on Linux.
TORCH_INDEX ?=
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.testable
ASSETS := .cache/assets/.complete

.PHONY: run test check bench bench-serve bench-quantize wheelhouse image lock clean help

run: $(INSTALLED)  ## set up, answer a question from the example documents, keep serving (DEMO=--once: stop after it)
	$(BIN)/lq demo $(DEMO)

test: $(TESTABLE) $(ASSETS)  ## set up, fetch the pinned test weights, run every test (ARGS: for pytest)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(ARGS)

check: $(TESTABLE)  ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(TESTABLE)  ## speed against llama-server of the same commit, alternating (ARGS: see --help)
	$(BIN)/python -m benchmarks.single_stream $(ARGS)

bench-serve: $(TESTABLE)  ## serving under load against llama-server, tables and plots, an hour or more (ARGS: --quick)
	$(BIN)/python -m benchmarks.serving $(ARGS)

bench-quantize: $(TESTABLE)  ## files of `lq quantize` against llama.cpp's recipes at equal bytes (ARGS: RUN FILE..., see --help)
	$(BIN)/python -m benchmarks.quantizing $(ARGS)

wheelhouse: $(INSTALLED)  ## every package as files, for a build or an installation without a network
	rm -rf wheelhouse
ifneq ($(TORCH_INDEX),)
	$(PIP) download --quiet --no-deps --dest wheelhouse --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.lock)
endif
	$(PIP) download --quiet --dest wheelhouse --find-links wheelhouse --requirement requirements.lock
	$(PIP) download --quiet --dest wheelhouse "scikit-build-core[pyproject]" cmake ninja setuptools wheel

image: $(INSTALLED)  ## build the container image, run it and ask it one question; needs docker, podman or buildah
	scripts/prove_image.sh

lock:  ## resolve pyproject.toml anew into the two locks
	$(PYTHON) -m venv .cache/lock && .cache/lock/bin/pip install --quiet uv
	.cache/lock/bin/python scripts/lock.py

clean:  ## remove what the targets above made; models and collections under LQ_HOME stay
	rm -rf $(VENV) .cache wheelhouse

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' Makefile

$(INSTALLED): requirements.lock pyproject.toml hatch_build.py $(wildcard engine/kernels/*.cpp engine/kernels/*.h quantize/rounding/kernels/*.cpp)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, say where: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PIP) --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
ifneq ($(TORCH_INDEX),)
	$(PIP) install --index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.lock)
endif
	$(PIP) install --requirement requirements.lock
	$(PIP) install --no-deps --no-build-isolation --editable .
	touch $@

$(TESTABLE): requirements-dev.lock $(INSTALLED)
	$(PIP) install --requirement requirements-dev.lock
	touch $@

$(ASSETS): tests/assets.toml tests/fetch_assets.py $(TESTABLE)
	$(BIN)/python tests/fetch_assets.py .cache/assets
	touch $@
