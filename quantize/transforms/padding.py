"""Zeros behind rows that blocks of 256 do not fill, so that K-quants can hold them, at a cost in bytes.

Knows whose graph allows it. Whether it pays is measured elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from models.gguf import Header
from quantize.network.network import EMBEDDING, OUTPUT, OUTPUT_NORM
from quantize.network.shape import LAYERS_OF_GEMMA3_27B, read_shape
from quantize.transforms.folded import Fold, Folded
from quantize.transforms.maps import Chain, Map, Padding, Scale
from quantize.transforms.places import along, gates, places, stream, unsupported

SUPER_BLOCK = 256  # columns of a K-quant's block


@dataclass(frozen=True, slots=True)
class Pad:
    """Zeros behind rows that whole blocks of 256 do not fill, so that K-quants can hold them."""

    name: str = "pad"

    def applies(self, header: Header) -> str | None:
        """Some architectures take a head's width from that of the stream, which would change it."""
        if (reason := unsupported(header)) is not None:
            return reason
        shape = read_shape(header)
        if not any(_missing(header).values()):
            return f"all rows are multiples of {SUPER_BLOCK} already"
        if _missing(header)["embedding_length"] and shape.architecture in ("qwen2", "phi3"):
            return f"llama.cpp takes the heads of {shape.architecture} from the width of the stream"
        if shape.architecture == "gemma3" and shape.n_layer == LAYERS_OF_GEMMA3_27B:
            return "llama.cpp takes the attention's scale from the width of the stream"
        return None

    def fold(self, model: Folded) -> Fold:
        """Means over the wider rows are smaller, which norms' weights and epsilon make up for."""
        missing, shape = _missing(model.header), model.model
        architecture = shape.architecture
        columns: dict[str, Map] = {}
        rows: dict[str, Map] = {}
        values: dict[str, int | float] = {}
        if more := missing["embedding_length"]:
            columns, rows = self._stream(model, more)
            width = shape.n_embd + more
            values = {
                f"{architecture}.embedding_length": width,
                f"{architecture}.attention.key_length": shape.head_dim,
                f"{architecture}.attention.value_length": shape.head_dim,
                f"{architecture}.rope.dimension_count": shape.rotaries[0].n_rot,
                f"{architecture}.attention.layer_norm_rms_epsilon": shape.epsilon * shape.n_embd / width,
            }
        if more := missing["feed_forward_length"]:
            inner = model.tensors["blk.0.ffn_down.weight"].shape[0]
            values[f"{architecture}.feed_forward_length"] = inner + more
            for place in places(model):
                if place.kind == "inner":
                    _chain(columns, dict.fromkeys(place.readers, Padding(more)))
                    _chain(rows, {**place.rows(model, Padding(more)), **gates(model, place, Padding(more))})
        return Fold(self.name, columns, rows, values)

    def _stream(self, model: Folded, more: int) -> tuple[dict[str, Map], dict[str, Map]]:
        line, width = stream(model), model.model.n_embd
        columns, rows = along(line, Padding(more))
        ratio = np.sqrt((width + more) / width)
        for name in line.norms:
            rows[name] = Chain((Scale(np.full(width, ratio)), Padding(more)))
        if model.model.embedding_scale != 1:  # the square root of the width, on the way in alone
            columns[EMBEDDING] = Chain((Scale(np.full(width, 1 / ratio)), Padding(more)))
            if OUTPUT not in model:  # and the head's columns with it
                rows[OUTPUT_NORM] = Chain((Scale(np.full(width, 1.0)), Padding(more)))
        return columns, rows


def _chain(maps: dict[str, Map], more: Mapping[str, Map]) -> None:
    """Add maps behind those that are there."""
    for name, change in more.items():
        maps[name] = Chain((maps[name], change)) if name in maps else change


def _missing(header: Header) -> dict[str, int]:
    """How many numbers rows of each kind lack to whole blocks."""
    shape = read_shape(header)
    inner = next(t.shape[0] for t in header.tensors if t.name == "blk.0.ffn_down.weight")
    widths = {"embedding_length": shape.n_embd, "feed_forward_length": inner}
    return {name: -width % SUPER_BLOCK for name, width in widths.items()}
