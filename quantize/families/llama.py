"""Llama 2 and 3, SmolLM2, Mistral and Mistral Nemo: one GGUF architecture.

Query and key rows are interleaved a head; llama3 rope scaling becomes a tensor of factors.
"""

from collections.abc import Mapping

import gguf
import numpy as np

from quantize.families import decoder
from quantize.families.config import Config
from quantize.families.recipe import Family, Recipe
from quantize.families.rope import Rope, llama3_factors, read_rope, write_rope


def _rope(config: Config) -> Rope:
    return read_rope(config, accepts=("default", "linear", "llama3", "yarn"))


def _check(config: Config) -> None:
    decoder.check_plain(config)
    decoder.check_full_rotation(config)


def _window(config: Config) -> int | None:
    """Tokens of Mistral's sliding window; where the file says nothing transformers slides 4096."""
    return config.values.get("sliding_window", 4096)


def _hyperparameters(config: Config, writer: gguf.GGUFWriter) -> None:
    decoder.write_decoder(config, writer)
    decoder.write_head_dim(config, writer)
    write_rope(_rope(config), config, writer)
    writer.add_vocab_size(config.integer("vocab_size"))
    writer.add_rope_dimension_count(config.head_dim)


def _recipes(config: Config) -> list[Recipe]:
    bias = config.flag("attention_bias")
    recipes = decoder.ends(config)
    for layer in range(config.integer("num_hidden_layers")):
        recipes += decoder.norms(config, layer, decoder.PRE_NORMS)
        recipes += decoder.attention(config, layer, qkv_bias=bias, output_bias=bias, interleave=True)
        recipes += decoder.feed_forward(config, layer, bias=config.flag("mlp_bias"))
    return recipes


def _generated(config: Config) -> Mapping[str, np.ndarray]:
    rope = _rope(config)
    return {"rope_freqs.weight": llama3_factors(rope, config)} if rope.kind == "llama3" else {}


LLAMA = Family(
    name="llama",
    classes=("LlamaForCausalLM",),
    architecture=gguf.MODEL_ARCH.LLAMA,
    defaults={
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 2048,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    check=_check,
    hyperparameters=_hyperparameters,
    recipes=_recipes,
    generated=_generated,
)

MISTRAL = Family(
    name="mistral",
    classes=("MistralForCausalLM",),
    architecture=gguf.MODEL_ARCH.LLAMA,
    defaults={
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    check=_check,
    hyperparameters=_hyperparameters,
    recipes=_recipes,
    generated=_generated,
    notes=lambda config: decoder.window_notes(config, _window(config)),
)
