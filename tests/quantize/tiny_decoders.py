"""Decoders of a few layers with random weights, one a variant of each family's graph, written as GGUF."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np

WIDTH, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 64, 96, 4, 2, 16, 120
CONTEXT = 256

#: name -> (architecture, keys, options of `write`)
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope.dimension_count": HEAD_DIM}, {}),
    "llama, tied, with factors and biases": (
        "llama",
        {},
        {"tied": True, "factors": "rope_freqs", "bias": True},
    ),
    "llama, wide heads, yarn": (
        "llama",
        {
            "attention.key_length": 32,
            "attention.value_length": 32,
            "rope.dimension_count": 32,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": 1.1,
        },
        {"head_dim": 32},
    ),
    "llama, linear rope": ("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, {}),
    "qwen2": ("qwen2", {"rope.freq_base": 1e6}, {"bias": True, "output_bias": False, "tied": True}),
    "qwen3": (
        "qwen3",
        {"attention.key_length": 32, "attention.value_length": 32},
        {"head_dim": 32, "head_norms": True},
    ),
    "gemma3": (
        "gemma3",
        {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "attention.sliding_window": 16,
            "rope.freq_base": 1e6,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        {"head_norms": True, "post_norms": True, "tied": True, "n_layer": 7},
    ),
    "gemma3, other pattern, capped": (
        "gemma3",
        {
            "attention.key_length": HEAD_DIM,
            "attention.value_length": HEAD_DIM,
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False, True],
            "rope.freq_base_swa": 20_000.0,
            "final_logit_softcapping": 3.0,
        },
        {"head_norms": True, "post_norms": True, "tied": True},
    ),
    "phi3": ("phi3", {"rope.scaling.original_context_length": CONTEXT}, {"fused": True}),
    "phi3, half of the head turns, factors": (
        "phi3",
        {
            "rope.dimension_count": 8,
            "rope.scaling.original_context_length": CONTEXT,
            "rope.scaling.attn_factor": 1.2,
        },
        {"fused": True, "factors": "rope_factors_short", "n_rot": 8},
    ),
}


def write(path: Path, variant: str, **changes: Any) -> Path:
    """Write a variant; `changes` go over its options."""
    architecture, keys, options = VARIANTS[variant]
    options = {**options, **changes}
    n_layer = options.get("n_layer", 3)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(n_layer)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in keys.items():
        _add(writer, f"{architecture}.{key}", value)
    _tokenizer(writer)
    kind = gguf.GGMLQuantizationType[options.get("type", "F32")]
    for name, weight in weights(options, n_layer).items():
        if weight.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(options: dict[str, Any], n_layer: int) -> dict[str, np.ndarray]:
    """By GGUF name."""
    random = np.random.default_rng(options.get("seed", 1))
    head_dim = options.get("head_dim", HEAD_DIM)
    q, kv = HEADS * head_dim, KV_HEADS * head_dim

    def draw(*shape: int) -> np.ndarray:
        return random.normal(0, 1.2 / np.sqrt(shape[-1]), shape).astype(np.float32)

    def norm(width: int) -> np.ndarray:
        return (1 + random.normal(0, 0.2, width)).astype(np.float32)

    made = {"token_embd.weight": random.normal(0, 0.5, (VOCABULARY, WIDTH)).astype(np.float32)}
    made["output_norm.weight"] = norm(WIDTH)
    if not options.get("tied"):
        made["output.weight"] = draw(VOCABULARY, WIDTH)
    if factors := options.get("factors"):
        n_rot = options.get("n_rot", head_dim)
        made[f"{factors}.weight"] = np.linspace(1, 3, n_rot // 2, dtype=np.float32)
    for layer in range(n_layer):
        shapes = {
            "attn_q": (q, WIDTH),
            "attn_k": (kv, WIDTH),
            "attn_v": (kv, WIDTH),
            "attn_output": (WIDTH, q),
        }
        shapes |= {"ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        if options.get("fused"):
            shapes = {"attn_qkv": (q + 2 * kv, WIDTH), "attn_output": (WIDTH, q)}
            shapes |= {"ffn_up": (2 * INNER, WIDTH), "ffn_down": (WIDTH, INNER)}
        norms = {"attn_norm": WIDTH, "ffn_norm": WIDTH}
        norms |= {"attn_q_norm": head_dim, "attn_k_norm": head_dim} if options.get("head_norms") else {}
        norms |= {"post_attention_norm": WIDTH, "post_ffw_norm": WIDTH} if options.get("post_norms") else {}
        for part, shape in shapes.items():
            made[f"blk.{layer}.{part}.weight"] = draw(*shape)
            biased = part in ("attn_q", "attn_k", "attn_v") or options.get("output_bias", True)
            if options.get("bias") and biased:
                made[f"blk.{layer}.{part}.bias"] = random.normal(0, 0.2, shape[0]).astype(np.float32)
        made |= {f"blk.{layer}.{part}.weight": norm(width) for part, width in norms.items()}
    return made


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    else:
        writer.add_float32(key, value)


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    """One that llama.cpp loads; texts are never tokenized."""
    writer.add_tokenizer_model("llama")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(VOCABULARY - 3))]
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *([6] * (VOCABULARY - 3))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
