"""Gemma 3, its text part: norms stored less one, sliding and full layers, two rotary bases.

Of the image-and-text model only the language model is converted.
"""

import re

import gguf

from quantize.families import decoder
from quantize.families.config import Config, UnsupportedConfig
from quantize.families.recipe import Family, Recipe
from quantize.families.rope import Rope, read_rope, write_rope

DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
}
#: llama.cpp recognises the 27B model, whose attention is scaled otherwise, by its layers.
LAYERS_OF_27B = 62
LLAMA_CPP_PATTERN = 6
NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def _global_rope(config: Config) -> Rope:
    return read_rope(config, accepts=("default", "linear"), layers="full_attention")


def _local_theta(config: Config) -> float:
    nested = (config.get("rope_parameters") or {}).get("sliding_attention") or {}
    if nested.get("rope_type", "default") != "default":
        raise UnsupportedConfig(
            "rope_parameters.sliding_attention.rope_type",
            nested["rope_type"],
            "is not supported; only 'default' is",
        )
    return float(nested.get("rope_theta") or config.number("rope_local_base_freq"))


def _slides(config: Config) -> list[bool]:
    """One value a layer: whether it slides a window."""
    n_layers, pattern = config.integer("num_hidden_layers"), config.integer("sliding_window_pattern")
    layers = config.get("layer_types")
    if layers is None:
        return [bool((layer + 1) % pattern) for layer in range(n_layers)]
    unknown = set(layers) - {"sliding_attention", "full_attention"}
    if unknown or len(layers) != n_layers:
        raise UnsupportedConfig(
            "layer_types", layers, f"must name sliding or full attention for {n_layers} layers"
        )
    return [kind == "sliding_attention" for kind in layers]


def _check(config: Config) -> None:
    decoder.check_plain(config, activation="hidden_activation", allowed=("gelu_pytorch_tanh",))
    decoder.check_full_rotation(config)
    config.require("attention_bias", (False,), "llama.cpp's gemma3 has no bias on the attention output")
    config.require("use_bidirectional_attention", (False,), "llama.cpp's gemma3 is causal")
    if config.get("attn_logit_softcapping"):
        raise UnsupportedConfig(
            "attn_logit_softcapping", config.get("attn_logit_softcapping"), "is not supported"
        )
    scalar, expected = config.number("query_pre_attn_scalar"), config.head_dim
    if config.integer("num_hidden_layers") == LAYERS_OF_27B:
        expected = config.integer("hidden_size") // config.integer("num_attention_heads")
    if scalar != expected:
        raise UnsupportedConfig(
            "query_pre_attn_scalar", scalar, f"is not {expected}, which llama.cpp assumes"
        )


def _hyperparameters(config: Config, writer: gguf.GGUFWriter) -> None:
    decoder.write_decoder(config, writer)
    decoder.write_head_dim(config, writer)
    write_rope(_global_rope(config), config, writer)
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config.number("final_logit_softcapping"))
    slides = _slides(config)
    if not any(slides):
        return
    writer.add_rope_freq_base_swa(_local_theta(config))
    writer.add_sliding_window(config.integer("sliding_window"))
    if slides != [bool((layer + 1) % LLAMA_CPP_PATTERN) for layer in range(len(slides))]:
        writer.add_sliding_window_pattern(slides)


def _recipes(config: Config) -> list[Recipe]:
    recipes = decoder.ends(config, shift=1.0)
    for layer in range(config.integer("num_hidden_layers")):
        recipes += decoder.norms(config, layer, NORMS, shift=1.0)
        recipes += decoder.attention(config, layer)
        recipes += decoder.head_norms(config, layer, shift=1.0)
        recipes += decoder.feed_forward(config, layer)
    return recipes


def _canonical(name: str) -> str | None:
    """Names of the language model within the image-and-text model, old and new; None for the images'."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.", name):
        return None
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return name.removeprefix("language_model.")


GEMMA3 = Family(
    name="gemma3",
    classes=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    architecture=gguf.MODEL_ARCH.GEMMA3,
    defaults=DEFAULTS,
    check=_check,
    hyperparameters=_hyperparameters,
    recipes=_recipes,
    canonical=_canonical,
    foreign_tokens=frozenset({"<image_soft_token>"}),
)
