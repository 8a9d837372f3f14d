"""A PEFT adapter merged while converting gives the logits that PEFT itself computes."""

import json
import shutil

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.lora import Adapter, AdapterMismatch
from quantize.convert import convert

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning"),
]

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EVERYTHING = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
PHI = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "original_max_position_embeddings": 256}
LORA = {"r": 4, "lora_alpha": 16, "init_lora_weights": False, "target_modules": EVERYTHING}

ADAPTERS = {
    "lora": ("LlamaConfig", {}, {}),
    "rslora": ("LlamaConfig", {}, {"use_rslora": True}),
    "dora": ("LlamaConfig", {}, {"use_dora": True}),
    "rank and alpha patterns": (
        "LlamaConfig",
        {},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
    ),
    "head saved whole, untied": ("LlamaConfig", {}, {"modules_to_save": ["lm_head"]}),
    "head changed, tied": (
        "LlamaConfig",
        {"tie_word_embeddings": True},
        {"target_modules": [*ATTENTION, "lm_head"]},
    ),
    "embedding changed, tied": (
        "LlamaConfig",
        {"tie_word_embeddings": True},
        {"target_modules": [*ATTENTION, "embed_tokens"]},
    ),
    "biases and qwen2": ("Qwen2Config", {}, {"use_dora": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}, {"use_rslora": True}),
    "gemma3": ("Gemma3TextConfig", {"head_dim": 16, "query_pre_attn_scalar": 16}, {"use_dora": True}),
    "fused phi3": (
        "Phi3Config",
        PHI,
        {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]},
    ),
}


@pytest.fixture
def train(tmp_path):
    """A function: model, LoraConfig values -> (PEFT model, folder); random factors instead of training."""
    import peft
    import torch

    def attach(model, values):
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**LORA, **values}))
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_magnitude" in name or "modules_to_save" in name:
                    parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
        wrapped.eval().save_pretrained(tmp_path / "adapter")
        return wrapped, tmp_path / "adapter"

    return attach


@pytest.fixture
def merge(make_tiny, train, torch_logits, evaluate_gguf, tmp_path):
    """A function: (config, shape, adapter, tokens) -> logits of the base, of PEFT, of our merged GGUF."""

    def run(config, shape, values, tokens):
        tiny = make_tiny(config, "llama2", **shape)
        plain = tiny.logits(tokens)
        model, folder = train(tiny.model, values)
        convert(tiny.path, tmp_path / "merged.gguf", dtype="F32", adapter=Adapter.open(folder))
        return plain, torch_logits(model, tokens), evaluate_gguf(tmp_path / "merged.gguf", tokens)

    return run


@pytest.mark.parametrize("name", ADAPTERS)
def test_merged_adapter_gives_pefts_logits(name, merge, max_kl, some_tokens):
    plain, wanted, merged = merge(*ADAPTERS[name], some_tokens)
    assert max_kl(wanted, merged) < 1e-4
    assert max_kl(plain, merged) > 1e-2, "the adapter changes nothing: the test proves nothing"


def test_a_change_smaller_than_bfloat16_can_tell_survives_and_the_rest_stays_as_stored(make_tiny, tmp_path):
    import torch

    tiny = make_tiny("LlamaConfig", "llama2")
    tiny.model.to(torch.bfloat16).save_pretrained(tiny.path)
    generator = np.random.default_rng(0)
    a = generator.normal(size=(2, 64)).astype(np.float32)
    b = generator.normal(size=(64, 2)).astype(np.float32) * 1e-5
    folder = tmp_path / "adapter"
    folder.mkdir()
    name = "base_model.model.model.layers.1.mlp.down_proj"
    save_file(
        {f"{name}.lora_A.weight": np.tile(a, (1, 2))[:, :96].copy(), f"{name}.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    convert(tiny.path, tmp_path / "plain.gguf")
    convert(tiny.path, tmp_path / "merged.gguf", adapter=Adapter.open(folder))
    plain, merged = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / f"{which}.gguf").tensors}
        for which in ("plain", "merged")
    )
    changed = {n for n in plain if plain[n].tensor_type != merged[n].tensor_type}
    assert changed == {"blk.1.ffn_down.weight"}
    before, after = (
        gguf.dequantize(of["blk.1.ffn_down.weight"].data, of["blk.1.ffn_down.weight"].tensor_type)
        for of in (plain, merged)
    )
    delta = b @ np.tile(a, (1, 2))[:, :96]
    assert np.abs(delta).max() < np.abs(before).mean() / 1000
    assert np.allclose(after - before, delta, atol=1e-7)
    assert np.mean(after == before) < 0.02


def test_adapter_of_another_model_is_refused(make_tiny, train, checkpoint, tmp_path):
    deeper = make_tiny("LlamaConfig", "llama2", num_hidden_layers=4)
    _, folder = train(deeper.model, {})
    with pytest.raises(AdapterMismatch, match=r"layers\.3\."):
        convert(checkpoint, tmp_path / "out.gguf", adapter=Adapter.open(folder))
    assert not (tmp_path / "out.gguf").exists()


def test_adapter_of_a_wider_model_is_refused_and_leaves_no_file(make_tiny, train, checkpoint, tmp_path):
    wider = make_tiny("LlamaConfig", "llama2", hidden_size=128)
    _, folder = train(wider.model, {})
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(AdapterMismatch, match="128"):
        convert(checkpoint, out, adapter=Adapter.open(folder))
    assert list(out.parent.iterdir()) == []
    shutil.rmtree(out.parent)
