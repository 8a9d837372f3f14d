"""Qwen2 and Qwen2.5 (biases on q, k, v) and Qwen3 (norms on each query and key head, no biases)."""

import gguf

from quantize.families import decoder
from quantize.families.config import Config
from quantize.families.recipe import Family, Recipe
from quantize.families.rope import read_rope, write_rope

DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 32_768,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def _window(config: Config) -> int | None:
    """Tokens of the sliding window, None where no layer uses one."""
    if not config.flag("use_sliding_window"):
        return None
    layers = config.get("layer_types")
    n_layers = config.integer("num_hidden_layers")
    slides = "sliding_attention" in layers if layers else config.get("max_window_layers", 28) < n_layers
    return config.values.get("sliding_window", 4096) if slides else None


def _hyperparameters(config: Config, writer: gguf.GGUFWriter) -> None:
    decoder.write_decoder(config, writer)
    write_rope(read_rope(config, accepts=("default", "linear", "yarn")), config, writer)


def _check_qwen2(config: Config) -> None:
    decoder.check_plain(config)
    decoder.check_square_attention(config)
    decoder.check_full_rotation(config)


def _recipes_qwen2(config: Config) -> list[Recipe]:
    recipes = decoder.ends(config)
    for layer in range(config.integer("num_hidden_layers")):
        recipes += decoder.norms(config, layer, decoder.PRE_NORMS)
        recipes += decoder.attention(config, layer, qkv_bias=True)
        recipes += decoder.feed_forward(config, layer)
    return recipes


def _check_qwen3(config: Config) -> None:
    decoder.check_plain(config)
    decoder.check_full_rotation(config)
    config.require("attention_bias", (False,), "llama.cpp's qwen3 has no bias on the attention output")


def _hyperparameters_qwen3(config: Config, writer: gguf.GGUFWriter) -> None:
    _hyperparameters(config, writer)
    decoder.write_head_dim(config, writer)


def _recipes_qwen3(config: Config) -> list[Recipe]:
    recipes = decoder.ends(config)
    for layer in range(config.integer("num_hidden_layers")):
        recipes += decoder.norms(config, layer, decoder.PRE_NORMS)
        recipes += decoder.attention(config, layer)
        recipes += decoder.head_norms(config, layer)
        recipes += decoder.feed_forward(config, layer)
    return recipes


QWEN2 = Family(
    name="qwen2",
    classes=("Qwen2ForCausalLM",),
    architecture=gguf.MODEL_ARCH.QWEN2,
    defaults=DEFAULTS,
    check=_check_qwen2,
    hyperparameters=_hyperparameters,
    recipes=_recipes_qwen2,
    notes=lambda config: decoder.window_notes(config, _window(config)),
)

QWEN3 = Family(
    name="qwen3",
    classes=("Qwen3ForCausalLM",),
    architecture=gguf.MODEL_ARCH.QWEN3,
    defaults=DEFAULTS | {"head_dim": 128},
    check=_check_qwen3,
    hyperparameters=_hyperparameters_qwen3,
    recipes=_recipes_qwen3,
    notes=lambda config: decoder.window_notes(config, _window(config)),
)
