"""Which type each tensor of a mix has, for people: a table by part, and a map of layers and parts.

Draws and lays out; decides nothing.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from models.tensor_types import TensorType

INK = "#1d2733"
IN_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight")
PARTS = (
    "token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up",
    "ffn_down",
)  # fmt: skip
#: From few bits to many; told apart in grey as well.
COLOURS = ("#2c105c", "#5b1a8a", "#8a2981", "#b73779", "#e0525f", "#f4795c", "#fca368", "#fdcd8a", "#fcf1c4")
EVERYWHERE = -1  # the layer of a tensor outside layers


def rows(types: Mapping[str, str]) -> list[tuple[str, str]]:
    """(part, "0-3 Q6_K, 4-29 Q4_K") for each part of a layer, and for tensors outside layers."""
    return [(part, _runs(layers)) for part, layers in _by_part(types).items()]


def figure(title: str, types: Mapping[str, str]) -> Figure:
    """Layers across, parts down, a colour a type; what is outside layers fills its whole row."""
    parts = _by_part(types)
    kinds = sorted(set(types.values()), key=lambda kind: (TensorType[kind].bits_per_weight, kind))
    n_layer = max(1, 1 + max(max(layers) for layers in parts.values()))
    empty = len(kinds)
    cells = [[empty] * n_layer for _ in parts]
    for row, layers in zip(cells, parts.values(), strict=True):
        for layer, kind in layers.items():
            row[:] = [kinds.index(kind)] * n_layer if layer == EVERYWHERE else row
            row[max(layer, 0)] = kinds.index(kind)
    colours = _colours(len(kinds))
    drawn = Figure(figsize=(8, 1.4 + 0.32 * len(parts)), dpi=144, layout="constrained")
    axes = drawn.add_subplot()
    palette = ListedColormap([*colours, "#ffffff"])
    axes.pcolormesh(cells, cmap=palette, vmin=-0.5, vmax=empty + 0.5, edgecolors="white", linewidth=0.6)
    axes.invert_yaxis()
    axes.set_yticks([i + 0.5 for i in range(len(parts))], list(parts), fontsize=9, color=INK)
    step = max(1, n_layer // 15)
    axes.set_xticks([i + 0.5 for i in range(0, n_layer, step)], [str(i) for i in range(0, n_layer, step)])
    axes.set_xlabel("layer", color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", color=INK)
    legend = [
        Patch(color=colour, label=f"{kind}  {TensorType[kind].bits_per_weight:.2f}")
        for colour, kind in zip(colours, kinds, strict=True)
    ]
    drawn.legend(
        handles=legend[::-1], loc="outside right upper", frameon=False, fontsize=9, title="bits a weight"
    )
    return drawn


def _by_part(types: Mapping[str, str]) -> dict[str, dict[int, str]]:
    """Part, such as "ffn_down" -> layer -> type, in the order in which a model computes them."""
    found: dict[str, dict[int, str]] = {}
    for name, kind in types.items():
        match = IN_LAYER.fullmatch(name)
        layer, part = (int(match[1]), match[2]) if match else (EVERYWHERE, name.removesuffix(".weight"))
        found.setdefault(part, {})[layer] = kind
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(part: str) -> tuple[int, str]:
    return (PARTS.index(part) if part in PARTS else len(PARTS), part)


def _runs(layers: Mapping[int, str]) -> str:
    told = []
    for kind, group in groupby(sorted(layers), key=lambda layer: layers[layer]):
        numbers = list(group)
        span = f"{numbers[0]}-{numbers[-1]} " if len(numbers) > 1 else f"{numbers[0]} "
        told.append(kind if EVERYWHERE in numbers else span + kind)
    return ", ".join(told)


def _colours(count: int) -> Sequence[str]:
    """As many of COLOURS, spread over all of them; more types than colours share some."""
    if count == 1:
        return [COLOURS[len(COLOURS) // 2]]
    return [COLOURS[round(i * (len(COLOURS) - 1) / (count - 1))] for i in range(count)]
