"""Where a decoder's activations can be mapped without its function changing: who makes them, who reads them.

Facts of the graphs of `quantize.network.network`; changes nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.gguf import Header
from quantize.network.network import EMBEDDING, OUTPUT, OUTPUT_NORM
from quantize.network.shape import UnsupportedNetwork, read_shape
from quantize.transforms.folded import Folded
from quantize.transforms.maps import Map, Parts

Kind = Literal["norm", "value", "inner"]
NORMS = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm")


@dataclass(frozen=True, slots=True)
class Place:
    """Activations between tensors that make them, each in `maker`'s rows from a first one on, and readers.

    "norm": after a norm's weight. "value": heads' values, which attention only averages. "inner": the second
    factor of a gated product. `width`: of what is made; `repeats`: how often a reader meets each head of it.
    """

    kind: Kind
    makers: tuple[tuple[str, int], ...]
    readers: tuple[str, ...]
    width: int
    head_width: int = 0
    repeats: int = 1

    @property
    def shared(self) -> np.ndarray | None:
        """(reader's width,): the channel made that each channel read is; None: they are the same."""
        if self.repeats == 1:
            return None
        heads = np.arange(self.width).reshape(-1, 1, self.head_width)
        return np.broadcast_to(heads, (len(heads), self.repeats, self.head_width)).reshape(-1)

    def rows(self, model: Folded, change: Map) -> dict[str, Map]:
        """The map of all that each maker makes."""
        return {name: self._within(model, name, first, change) for name, first in self.makers}

    def _within(self, model: Folded, name: str, first: int, change: Map) -> Map:
        rest = model.shape(name)[0] - first - self.width
        if not first and not rest:
            return change
        parts = ((first, None), (self.width, change), (rest, None))
        return Parts([part for part in parts if part[0]])


def places(model: Folded) -> Iterator[Place]:
    """All of them but the residual stream, layer by layer, and then the head's norm where nothing is tied."""
    for layer in range(model.model.n_layer):
        yield from _of_layer(model, f"blk.{layer}.")
    if OUTPUT in model:
        yield Place("norm", ((OUTPUT_NORM, 0),), (OUTPUT,), model.shape(OUTPUT_NORM)[0])


def _of_layer(model: Folded, layer: str) -> Iterator[Place]:
    def there(*parts: str) -> tuple[str, ...]:
        names = [f"{layer}{part}.weight" for part in parts]
        return tuple(name for name in names if name in model)

    def makers(part: str, first: int = 0) -> tuple[tuple[str, int], ...]:
        names = (f"{layer}{part}.weight", f"{layer}{part}.bias")
        return tuple((name, first) for name in names if name in model)

    shape, width = model.model, model.shape(f"{layer}attn_norm.weight")[0]
    yield Place("norm", makers("attn_norm"), there("attn_q", "attn_k", "attn_v", "attn_qkv"), width)
    fused, queries = bool(there("attn_qkv")), shape.n_head * shape.head_dim
    made = shape.n_head_kv * shape.head_dim
    yield Place(
        "value",
        makers("attn_qkv", queries + made) if fused else makers("attn_v"),
        there("attn_output"),
        made,
        shape.head_dim,
        shape.n_head // shape.n_head_kv,
    )
    yield Place("norm", makers("ffn_norm"), there("ffn_gate", "ffn_up"), width)
    inner = model.shape(f"{layer}ffn_down.weight")[1]
    gated = bool(there("ffn_gate"))  # else the gate is in the same tensor, before the other factor
    yield Place("inner", makers("ffn_up", 0 if gated else inner), there("ffn_down"), inner)


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream behind the embedding: tensors that write to it, norms that scale it, and the
    matrices behind norms, each with its norm. A head that is the embedding itself is not among them."""

    writers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: dict[str, str]


def stream(model: Folded) -> Stream:
    """That of a decoder."""
    writers, norms, readers = [], [OUTPUT_NORM], {}
    for layer in range(model.model.n_layer):
        start = f"blk.{layer}."
        parts = [f"{part}.{kind}" for part in ("attn_output", "ffn_down") for kind in ("weight", "bias")]
        writers += [start + part for part in parts if start + part in model]
        norms += [f"{start}{part}.weight" for part in NORMS if f"{start}{part}.weight" in model]
    for place in places(model):
        if place.kind == "norm":
            readers |= dict.fromkeys(place.readers, place.makers[0][0])
    return Stream(tuple(writers), tuple(norms), readers)


def gates(model: Folded, place: Place, change: Map) -> dict[str, Map]:
    """The same for what makes the gate: a matrix of its own, or the other half of the one that holds both."""
    name, first = place.makers[0]
    if not first:
        gate = name.replace("ffn_up", "ffn_gate")
        names = (gate, gate.replace(".weight", ".bias"))
        return {name: change for name in names if name in model}
    halves = Parts([(place.width, change), (place.width, change)])
    return {name: halves for name, _ in place.makers}


def along(line: Stream, change: Map) -> tuple[dict[str, Map], dict[str, Map]]:
    """Columns and rows of everything on the residual stream, for maps that norms commute with."""
    columns = dict.fromkeys((EMBEDDING, *line.readers), change)
    return columns, dict.fromkeys((*line.writers, *line.norms), change)


def unsupported(header: Header) -> str | None:
    """Why nothing is known of a model's graph; None where it is known."""
    try:
        read_shape(header)
    except UnsupportedNetwork as error:
        return str(error)
    return None
