"""SmolLM2 converts to what llama.cpp's own converter makes of it, byte for byte."""

import importlib.util
import json
from pathlib import Path

import pytest

from quantize.convert import convert

GOLDEN = Path(__file__).parent / "golden"
#: Keys we write beyond llama.cpp's converter, with the value that llama.cpp assumes where there is none.
SPELT_OUT = {"tokenizer.ggml.add_eos_token": {"type": "BOOL", "value": False}}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_golden", GOLDEN / "make_golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "smollm2.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def ours(script, smollm2_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("golden") / "smollm2.gguf"
    convert(smollm2_checkpoint, out)
    return script.summary(out)


def test_rebuilt_checkpoint_is_the_one_the_golden_file_was_made_from(script, golden, smollm2_checkpoint):
    assert script.file_sha256(smollm2_checkpoint / "model.safetensors") == golden["checkpoint"]


def test_every_tensor_equals_upstreams(ours, golden):
    assert ours["tensors"] == golden["tensors"]


def test_every_metadata_key_equals_upstreams(ours, golden):
    assert ours["metadata"] == golden["metadata"] | SPELT_OUT
