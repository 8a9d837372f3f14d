"""Phi-3, Phi-3.5 and Phi-4: fused qkv and gate_up stay fused; longrope factors become two tensors."""

import math
from collections.abc import Mapping

import gguf
import numpy as np

from quantize.families import decoder
from quantize.families.config import Config, UnsupportedConfig
from quantize.families.recipe import Family, Recipe
from quantize.families.rope import Rope, original_context, read_rope

#: transformers reads the older spellings as longrope too
LONGROPE = ("longrope", "su", "yarn")


def _rope(config: Config) -> Rope:
    return read_rope(config, accepts=("default", *LONGROPE))


def _rotated(config: Config) -> int:
    """Elements of a head that rotate."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    part = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    return int(config.head_dim * part)


def _check(config: Config) -> None:
    decoder.check_plain(config)
    decoder.check_square_attention(config)
    if _rotated(config) % 2:
        raise UnsupportedConfig(
            "partial_rotary_factor", _rotated(config), "rotates an odd number of elements"
        )


def _attention_factor(rope: Rope, config: Config) -> float:
    """What transformers multiplies cosines and sines with."""
    if rope.parameters.get("attention_factor") is not None:
        return rope.number("attention_factor")
    original = original_context(rope, config)
    factor = rope.number("factor", config.integer("max_position_embeddings") / original)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _hyperparameters(config: Config, writer: gguf.GGUFWriter) -> None:
    rope = _rope(config)
    decoder.write_decoder(config, writer)
    writer.add_rope_freq_base(rope.theta)
    writer.add_rope_dimension_count(_rotated(config))
    writer.add_rope_scaling_orig_ctx_len(original_context(rope, config))
    # llama.cpp has no window for this architecture; zero tells it not to guess
    writer.add_sliding_window(config.get("sliding_window", 0))
    if rope.kind in LONGROPE:
        writer.add_rope_scaling_attn_factors(_attention_factor(rope, config))


def _recipes(config: Config) -> list[Recipe]:
    hidden, inner, dim = config.integer("hidden_size"), config.integer("intermediate_size"), config.head_dim
    q, kv = config.integer("num_attention_heads"), config.n_head_kv
    recipes = decoder.ends(config)
    for layer in range(config.integer("num_hidden_layers")):
        source, target = f"model.layers.{layer}", f"blk.{layer}"
        recipes += decoder.norms(config, layer, decoder.PRE_NORMS)
        recipes += [
            Recipe(
                f"{source}.self_attn.qkv_proj.weight",
                f"{target}.attn_qkv.weight",
                ((q + 2 * kv) * dim, hidden),
            ),
            Recipe(f"{source}.self_attn.o_proj.weight", f"{target}.attn_output.weight", (hidden, q * dim)),
            Recipe(f"{source}.mlp.gate_up_proj.weight", f"{target}.ffn_up.weight", (2 * inner, hidden)),
            Recipe(f"{source}.mlp.down_proj.weight", f"{target}.ffn_down.weight", (hidden, inner)),
        ]
    return recipes


def _generated(config: Config) -> Mapping[str, np.ndarray]:
    rope = _rope(config)
    if rope.kind not in LONGROPE:
        return {}
    tensors = {}
    for length in ("long", "short"):
        factors = rope.parameters.get(f"{length}_factor")
        if not isinstance(factors, list) or len(factors) != _rotated(config) // 2:
            found = len(factors) if isinstance(factors, list) else factors
            raise UnsupportedConfig(
                f"rope_scaling.{length}_factor", found, f"must hold {_rotated(config) // 2} numbers"
            )
        tensors[f"rope_factors_{length}.weight"] = np.array(factors, dtype=np.float32)
    return tensors


def _notes(config: Config) -> tuple[str, ...]:
    notes = decoder.window_notes(config, config.get("sliding_window"))
    if _rope(config).kind in LONGROPE:
        original = original_context(_rope(config), config)
        notes += (
            "Of the two sets of rotary factors llama.cpp uses the one for long texts wherever a sequence may "
            f"hold more than {original} tokens, however short it is; transformers goes by the text's length.",
        )
    return notes


PHI3 = Family(
    name="phi3",
    classes=("Phi3ForCausalLM",),
    architecture=gguf.MODEL_ARCH.PHI3,
    defaults={
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    },
    check=_check,
    hyperparameters=_hyperparameters,
    recipes=_recipes,
    generated=_generated,
    notes=_notes,
)
