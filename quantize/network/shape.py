"""What a decoder computes, read from a GGUF's metadata: widths, heads, rotary embedding, windows, scales.

Facts of llama.cpp's graphs of the families that `quantize.families` converts, with llama.cpp's own defaults
for what a file leaves out. Reads no tensor data and computes nothing.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from models.gguf import Header
from quantize.errors import QuantizeError

#: Architectures whose graph `quantize.network.network` has, and whether their rotary pairs are neighbours.
ARCHITECTURES = {"llama": True, "qwen2": False, "qwen3": False, "gemma3": False, "phi3": False}
SCALINGS = ("none", "linear", "yarn", "longrope")
LAYERS_OF_GEMMA3_27B = 62
GEMMA3_PATTERN = 6  # every sixth layer sees everything
#: What every tensor of a layer may be called; anything else means a graph that is not ours.
LAYER_WEIGHTS = frozenset(
    {"attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_q_norm", "attn_k_norm", "attn_output"}
    | {"post_attention_norm", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm"}
)
KINDS = ("weight", "bias")
NEEDED = frozenset({"attn_norm", "attn_output", "ffn_norm", "ffn_up", "ffn_down"})
HEAD_NORMS = {"attn_q_norm", "attn_k_norm"}
GEMMA_NORMS = {"post_attention_norm", "post_ffw_norm"}
OTHER_TENSORS = frozenset(
    {"token_embd.weight", "output_norm.weight", "output.weight", "output.bias", "rope_freqs.weight"}
    | {"rope_factors_long.weight", "rope_factors_short.weight"}
)


class UnsupportedNetwork(QuantizeError):
    """A model whose arithmetic is not implemented here; the engine can still run it."""

    def __init__(self, header: Header, problem: str) -> None:
        known = ", ".join(ARCHITECTURES)
        super().__init__(
            f"{header.path}: {problem}; gradients are computed for the dense decoders {known}. "
            "Sensitivities of other models are measured by running them"
        )


@dataclass(frozen=True, slots=True)
class Rotary:
    """How positions turn queries and keys. `n_rot`: elements of a head that turn; `factors`: a tensor."""

    n_rot: int
    interleaved: bool
    base: float
    scale: float  # positions are multiplied by it
    yarn: bool
    n_ctx_original: int
    magnitude: float  # what cosines and sines are multiplied by
    factors: str | None


@dataclass(frozen=True, slots=True)
class Shape:
    """One model. `windows` and `rotaries` have one value a layer; a window of None sees everything."""

    architecture: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_dim: int
    epsilon: float
    attention_scale: float
    embedding_scale: float
    activation: Literal["silu", "gelu"]
    logit_cap: float | None
    windows: tuple[int | None, ...]
    rotaries: tuple[Rotary, ...]


def read_shape(header: Header, *, n_ctx: int | None = None) -> Shape:
    """The shape of a model; raises UnsupportedNetwork by name.

    `n_ctx`: tokens of a sequence where the model will run, which decides between a longrope model's two sets
    of factors; None: no more than it was first trained on.
    """
    keys = _Keys(header)
    if keys.architecture not in ARCHITECTURES:
        raise UnsupportedNetwork(header, f"the architecture {keys.architecture!r} is not implemented")
    _check_tensors(header, keys)
    n_layer, n_head = keys.integer("block_count"), keys.integer("attention.head_count")
    n_embd = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", n_embd // n_head)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedNetwork(header, "keys and values have different widths")
    windows = _windows(keys, n_layer)
    gemma = keys.architecture == "gemma3"
    scaled = n_embd // n_head if gemma and n_layer == LAYERS_OF_GEMMA3_27B else head_dim
    return Shape(
        architecture=keys.architecture,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_head_kv=keys.integer("attention.head_count_kv", n_head),
        head_dim=head_dim,
        epsilon=keys.number("attention.layer_norm_rms_epsilon"),
        attention_scale=1 / math.sqrt(scaled),
        embedding_scale=math.sqrt(n_embd) if gemma else 1.0,
        activation="gelu" if gemma else "silu",
        logit_cap=(keys.number("final_logit_softcapping", 0.0) or None) if gemma else None,
        windows=windows,
        rotaries=_rotaries(header, keys, windows, head_dim, n_ctx),
    )


class _Keys:
    """Typed access to an architecture's own keys."""

    def __init__(self, header: Header) -> None:
        self.header = header
        self.architecture = str(header.architecture)

    def get(self, name: str, default: Any = None) -> Any:
        value = self.header.hyperparameter(name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnsupportedNetwork(self.header, f"{self.architecture}.{name} is {value!r}, not a number")
        return float(value)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if isinstance(value, list | tuple) and value and len(set(value)) == 1:
            value = value[0]  # one a layer, all the same
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UnsupportedNetwork(self.header, f"{self.architecture}.{name} is {value!r}, not one count")
        return value


def _check_tensors(header: Header, keys: _Keys) -> None:
    """Every tensor has its place in the graph, and no place is empty."""
    n_layer = keys.integer("block_count")
    names = {tensor.name for tensor in header.tensors}
    tensors = [f"{part}.{kind}" for part in LAYER_WEIGHTS for kind in KINDS]
    known = {f"blk.{layer}.{tensor}" for layer in range(n_layer) for tensor in tensors}
    if strange := sorted(names - known - OTHER_TENSORS):
        raise UnsupportedNetwork(header, f"the tensor {strange[0]} has no part in the arithmetic known here")
    wanted = {"token_embd.weight", "output_norm.weight"}
    for layer in range(n_layer):
        parts = set(NEEDED)
        parts |= set() if keys.architecture == "phi3" else {"ffn_gate"}
        fused = f"blk.{layer}.attn_qkv.weight" in names
        parts |= {"attn_qkv"} if fused else {"attn_q", "attn_k", "attn_v"}
        parts |= HEAD_NORMS if keys.architecture in ("qwen3", "gemma3") else set()
        parts |= GEMMA_NORMS if keys.architecture == "gemma3" else set()
        wanted |= {f"blk.{layer}.{part}.weight" for part in parts}
    if missing := sorted(wanted - names):
        raise UnsupportedNetwork(header, f"the tensor {missing[0]} is missing")


def _windows(keys: _Keys, n_layer: int) -> tuple[int | None, ...]:
    """Only gemma3's windows exist in llama.cpp's graphs; it ignores those of the other families."""
    window = keys.get("attention.sliding_window", 0) if keys.architecture == "gemma3" else 0
    if not window:
        return (None,) * n_layer
    pattern = keys.get("attention.sliding_window_pattern", GEMMA3_PATTERN)
    if isinstance(pattern, list | tuple):
        slides = [bool(value) for value in pattern]
    else:
        period = keys.integer("attention.sliding_window_pattern", GEMMA3_PATTERN)
        slides = [layer % period < period - 1 for layer in range(n_layer)]
    if len(slides) != n_layer:
        raise UnsupportedNetwork(
            keys.header, f"sliding_window_pattern has {len(slides)} values for {n_layer} layers"
        )
    return tuple(int(window) if slide else None for slide in slides)


def _rotaries(
    header: Header, keys: _Keys, windows: tuple[int | None, ...], head_dim: int, n_ctx: int | None
) -> tuple[Rotary, ...]:
    scaling = keys.get("rope.scaling.type", "linear")
    if scaling not in SCALINGS:
        raise UnsupportedNetwork(header, f"the rope scaling {scaling!r} is not implemented")
    factor = 1.0 if scaling == "none" else keys.number("rope.scaling.factor", 0.0)
    factor = factor or keys.number("rope.scale_linear", 0.0) or 1.0
    original = keys.integer("rope.scaling.original_context_length", keys.integer("context_length"))
    n_rot = keys.integer("rope.dimension_count", head_dim)
    if n_rot % 2 or n_rot > head_dim:
        raise UnsupportedNetwork(header, f"rope.dimension_count is {n_rot} in heads of {head_dim}")
    magnitude = keys.number("rope.scaling.attn_factor", 1.0)
    everywhere = Rotary(
        n_rot=n_rot,
        interleaved=ARCHITECTURES[keys.architecture],
        base=keys.number("rope.freq_base", 10_000.0),
        scale=1 / factor,
        yarn=scaling == "yarn",
        n_ctx_original=original,
        magnitude=magnitude * (_yarn_magnitude(factor) if scaling == "yarn" else 1.0),
        factors=_factors({tensor.name for tensor in header.tensors}, original, n_ctx),
    )
    sliding = Rotary(
        n_rot=n_rot,
        interleaved=everywhere.interleaved,
        base=keys.number("rope.freq_base_swa", 10_000.0),
        scale=1.0,
        yarn=False,
        n_ctx_original=original,
        magnitude=magnitude,
        factors=None,
    )
    return tuple(everywhere if window is None else sliding for window in windows)


def _yarn_magnitude(factor: float) -> float:
    return 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(names: set[str], original: int, n_ctx: int | None) -> str | None:
    """The tensor that divides the frequencies, where there is one."""
    length = "long" if n_ctx is not None and n_ctx > original else "short"
    for name in ("rope_freqs.weight", f"rope_factors_{length}.weight"):
        if name in names:
            return name
    return None


def layer_of(name: str) -> int | None:
    """The layer a tensor is part of; None for the embedding, the head and what belongs to all layers."""
    part, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    return int(number) if part == "blk" and number.isdigit() else None


def kind_of(name: str) -> str:
    """A tensor's name without its layer: "blk.3.attn_q.weight" -> "attn_q.weight"."""
    return name.split(".", 2)[2] if layer_of(name) is not None else name
