"""Each family's float32 GGUF computes in llama.cpp what transformers computes from the checkpoint."""

from pathlib import Path

import pytest

from quantize.convert import convert

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.5}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
PHI4_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0 + 0.1 * i for i in range(6)],
    "long_factor": [2.0 + i for i in range(6)],
}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16}
GEMMA_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
}
PHI = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "original_max_position_embeddings": 256}

FAMILIES = {
    "llama2": ("LlamaConfig", "llama2", {}),
    "llama3, tied": ("LlamaConfig", "llama3_2", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "mistral nemo": ("MistralConfig", "mistral_nemo", {"head_dim": 24, "sliding_window": None}),
    "qwen2, tied": ("Qwen2Config", "qwen2_5", {"tie_word_embeddings": True, "pad": 64}),
    "qwen3": ("Qwen3Config", "qwen3", {"head_dim": 32}),
    "gemma3": ("Gemma3TextConfig", "gemma3", {**GEMMA, "num_hidden_layers": 7, "pad": 63}),
    "phi3": ("Phi3Config", "llama2", PHI),
}
#: what differs within a family needs no large vocabulary
VARIANTS = {
    "llama, biases everywhere, padded": (
        "LlamaConfig",
        {"attention_bias": True, "mlp_bias": True, "pad": 7, "num_key_value_heads": 4},
    ),
    "llama, explicit head_dim, one key-value head": (
        "LlamaConfig",
        {"head_dim": 32, "num_key_value_heads": 1},
    ),
    "llama, linear rope": ("LlamaConfig", {"rope_parameters": LINEAR}),
    "llama, yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama, yarn with attention_factor": (
        "LlamaConfig",
        {"rope_parameters": {**YARN, "attention_factor": 1.4}},
    ),
    "llama, yarn with mscale": (
        "LlamaConfig",
        {"rope_parameters": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7}},
    ),
    "mistral, window": ("MistralConfig", {"sliding_window": 100}),
    "qwen2, yarn, untied": ("Qwen2Config", {"rope_parameters": YARN}),
    "qwen3, tied": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma3, other pattern, linear rope, capped logits": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "final_logit_softcapping": 20.0,
            "rope_parameters": GEMMA_ROPE,
        },
    ),
    "phi3, longrope": (
        "Phi3Config",
        {**PHI, "max_position_embeddings": 512, "rope_parameters": LONGROPE},
    ),
    "phi3 as Phi-4-mini has it: longrope over a part of the head, tied": (
        "Phi3Config",
        {
            **PHI,
            "max_position_embeddings": 512,
            "original_max_position_embeddings": 256,
            "rope_parameters": PHI4_ROPE,
            "partial_rotary_factor": 0.75,
            "sliding_window": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "phi3, part of the head rotates, tied": (
        "Phi3Config",
        {**PHI, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
    ),
}


@pytest.fixture
def divergence(make_tiny, evaluate_gguf, max_kl, some_tokens, tmp_path):
    def measure(config: str, tokenizer: str | Path, values: dict) -> float:
        tiny = make_tiny(config, tokenizer, **values)
        convert(tiny.path, tmp_path / "tiny.gguf", dtype="F32")
        return max_kl(tiny.logits(some_tokens), evaluate_gguf(tmp_path / "tiny.gguf", some_tokens))

    return measure


@pytest.mark.parametrize("name", FAMILIES)
def test_family_computes_what_transformers_does(name, divergence):
    assert divergence(*FAMILIES[name]) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_computes_what_transformers_does(name, divergence):
    config, values = VARIANTS[name]
    assert divergence(config, "llama2", values) < 1e-4


def test_phi4_mini_with_gpt4os_tokenizer_computes_what_transformers_does(divergence, phi4_tokenizer):
    _, values = VARIANTS["phi3 as Phi-4-mini has it: longrope over a part of the head, tied"]
    assert divergence("Phi3Config", phi4_tokenizer, {**values, "pad": 20_000}) < 1e-4


def test_mistral_with_tokenizer_model_alone_computes_what_transformers_does(
    divergence, mistral_v3_model, tmp_path
):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(mistral_v3_model)
    values = {"vocab_size": 32_010, "sliding_window": None, "rope_theta": 1e6}
    assert divergence("MistralConfig", tmp_path / "tokenizer", values) < 1e-4


def test_text_part_of_image_and_text_gemma3_is_converted(
    make_tiny, evaluate_gguf, max_kl, some_tokens, tmp_path
):
    import json

    from safetensors.torch import load_file, save_file

    tiny = make_tiny("Gemma3TextConfig", "llama2", **GEMMA)
    weights = load_file(tiny.path / "model.safetensors")
    nested = {f"language_model.{name}": tensor.clone() for name, tensor in weights.items()}
    nested["vision_tower.vision_model.post_layernorm.weight"] = tensor_of_ones()
    nested["multi_modal_projector.mm_input_projection_weight"] = tensor_of_ones()
    save_file(nested, tiny.path / "model.safetensors", {"format": "pt"})
    text = json.loads((tiny.path / "config.json").read_text())
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": text}
    text.pop("architectures")
    (tiny.path / "config.json").write_text(json.dumps(outer))
    convert(tiny.path, tmp_path / "tiny.gguf", dtype="F32")
    candidate = evaluate_gguf(tmp_path / "tiny.gguf", some_tokens)
    assert max_kl(tiny.logits(some_tokens), candidate) < 1e-4


def tensor_of_ones():
    import torch

    return torch.ones(4)
