"""Real weights and tokenizers for the tests, from `.cache/assets`, which `make test` fills beforehand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache"
ASSETS = CACHE / "assets"

# Nothing may reach for a hub: a test that would needs the network has a defect.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# Idle OpenMP threads sleep instead of spinning: several engines and torch share the cores in these tests, and
# spinning makes each of them ten times slower (docs/log.md).
os.environ.setdefault("GOMP_SPINCOUNT", "0")


def pytest_unconfigure() -> None:
    """Close the files that llama_cpp opens for good: Python would warn of them after the summary."""
    module = sys.modules.get("llama_cpp._utils")
    if module is not None:
        module.outnull_file.close()
        module.errnull_file.close()


def fetched(path: Path) -> Path:
    """The path, or a failure that says how to get it."""
    assert path.exists(), f"{path.relative_to(ROOT)} is missing: run `make test`, which fetches it"
    return path


@pytest.fixture(scope="session")
def asset_home() -> Path:
    """An LQ_HOME that holds the pulled models; shared by the session: read it, do not change it."""
    return fetched(ASSETS / "home")


@pytest.fixture(scope="session")
def smollm2_gguf(asset_home: Path) -> Path:
    """SmolLM2-135M-Instruct as Q4_1, the embedded default (98 MB)."""
    from models.store import Store

    return Store(asset_home).resolve_model("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def minilm_dir(asset_home: Path) -> Path:
    """all-MiniLM-L6-v2 as a sentence-transformers folder (384 wide)."""
    from models.store import Store

    return Store(asset_home).resolve_embedder("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def tokenizer_dir():
    """A function: name of a tokenizer in tests/assets.toml -> folder with its tokenizer.json."""
    return lambda name: fetched(ASSETS / "tokenizers" / name)


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path) -> Path:
    """A Hugging Face checkpoint (bf16 safetensors) rebuilt from the GGUF; the same bytes every time."""
    target = CACHE / "checkpoints" / "smollm2"
    with FileLock(CACHE / "checkpoint.lock"):
        if not target.exists():
            partial = target.with_name("smollm2.partial")
            shutil.rmtree(partial, ignore_errors=True)
            command = [sys.executable, ROOT / "scripts/make_checkpoint.py", smollm2_gguf, partial]
            subprocess.run(command, check=True, capture_output=True)
            partial.rename(target)
    return target
