"""Rotary position embeddings: config.json's two spellings in, GGUF keys and factor tensors out.

Owns the scaling types; a type that llama.cpp computes differently from transformers is refused by name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np

from quantize.families.config import Config, UnsupportedConfig


@dataclass(frozen=True, slots=True)
class Rope:
    """One rotary embedding; `parameters` holds the scaling type's own numbers."""

    kind: str
    theta: float
    parameters: Mapping[str, Any]

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number among the parameters."""
        value = self.parameters.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UnsupportedConfig(f"rope_scaling.{name}", value, "must be a positive number")
        return float(value)


def read_rope(config: Config, *, accepts: tuple[str, ...], layers: str | None = None) -> Rope:
    """The embedding of all layers, or of those of type `layers` where the file has one a type."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layers is not None and isinstance(parameters, dict):
        parameters = parameters.get(layers) or parameters
    if not isinstance(parameters, dict):
        raise UnsupportedConfig("rope_scaling", parameters, "must be an object; download config.json again")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in accepts:
        known = ", ".join(accepts)
        raise UnsupportedConfig(
            "rope_scaling.rope_type", kind, f"is not supported for this family; supported: {known}"
        )
    theta = parameters.get("rope_theta") or config.number("rope_theta")
    return Rope(kind, float(theta), parameters)


def original_context(rope: Rope, config: Config) -> int:
    """Tokens the model was trained on before its context was stretched."""
    value = config.get("original_max_position_embeddings")
    value = value or rope.parameters.get("original_max_position_embeddings")
    return int(value or config.integer("max_position_embeddings"))


def write_rope(rope: Rope, config: Config, writer: gguf.GGUFWriter) -> None:
    """The base frequency, and the scaling that llama.cpp computes itself (linear, yarn)."""
    writer.add_rope_freq_base(rope.theta)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.number("factor"))
    if rope.kind == "yarn":
        _write_yarn(rope, config, writer)


#: yarn's numbers that llama.cpp has compiled in for our architectures; it ignores keys for them
YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True}


def _write_yarn(rope: Rope, config: Config, writer: gguf.GGUFWriter) -> None:
    for name, fixed in YARN_FIXED.items():
        value = rope.parameters.get(name)
        if value is not None and value != fixed:
            raise UnsupportedConfig(
                f"rope_scaling.{name}", value, f"is not supported: llama.cpp uses {fixed}"
            )
    factor = rope.number("factor")
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(original_context(rope, config))
    ratio = _yarn_attention(rope, factor) / _mscale(factor, 1.0)
    if not math.isclose(ratio, 1.0, rel_tol=1e-6):
        # llama.cpp works out the usual factor by itself and multiplies it with this one
        writer.add_rope_scaling_attn_factors(ratio)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention(rope: Rope, factor: float) -> float:
    """transformers' attention_factor: given, from mscale and mscale_all_dim, or the usual one."""
    if rope.parameters.get("attention_factor") is not None:
        return rope.number("attention_factor")
    mscale, all_dim = rope.parameters.get("mscale"), rope.parameters.get("mscale_all_dim")
    if mscale and all_dim:
        return _mscale(factor, rope.number("mscale")) / _mscale(factor, rope.number("mscale_all_dim"))
    return _mscale(factor, 1.0)


def llama3_factors(rope: Rope, config: Config) -> np.ndarray:
    """What each frequency is divided by: 1 for short waves, `factor` for long ones, a blend between."""
    dim = config.head_dim
    one = np.float32(1)
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    waves = np.float32(2 * math.pi) / (one / np.float32(rope.theta) ** exponents)
    factor, context = rope.number("factor", 8.0), np.float32(original_context(rope, config))
    low, high = rope.number("low_freq_factor", 1.0), rope.number("high_freq_factor", 4.0)
    smooth = (context / waves - np.float32(low)) / np.float32(high - low)
    blend = one / ((one - smooth) / np.float32(factor) + smooth)
    factors = np.where(waves < context / np.float32(high), one, blend)
    return np.where(waves > context / np.float32(low), np.float32(factor), factors).astype(np.float32)
