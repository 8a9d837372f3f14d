"""The heat map of a tensor report: layers by kinds of tensors, a panel a figure.

Draws without a display and without global state.
"""

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from quantize.network.shape import kind_of, layer_of
from quantize.structure.outliers import TensorFigures
from quantize.structure.tensor_report import TensorReport

INK, EMPTY = "#1d2733", "#e5e7eb"
COLOURS = "viridis"
#: Parts of a layer in the order they compute, as far as they are known.
ORDER = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")

Figure_of = Callable[[TensorFigures], float | None]


def tensor_figure(report: TensorReport) -> Figure | None:
    """Panels of what is known; None where no tensor is in any layer."""
    layers = sorted({layer for tensor in report.tensors if (layer := layer_of(tensor.name)) is not None})
    kinds = _kinds(report.tensors)
    panels = _panels(report)
    if not layers or not panels:
        return None
    rows = [*kinds, *(tensor.name for tensor in report.tensors if layer_of(tensor.name) is None)]
    height = 0.8 + len(panels) * (0.55 + 0.23 * len(rows))
    figure = Figure(figsize=(max(6.0, 2.8 + 0.2 * len(layers)), height), dpi=144, layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    step = max(1, len(layers) // 16)
    for panel, (title, of, log) in zip(axes, panels, strict=True):
        _panel(figure, panel, title, _values(report.tensors, rows, layers, of), log=log)
        panel.set_yticks(
            range(len(rows)), [row.removesuffix(".weight") for row in rows], fontsize=8, color=INK
        )
        panel.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes[-1].set_xlabel("layer", color=INK)
    return figure


def _panels(report: TensorReport) -> list[tuple[str, Figure_of, bool]]:
    """Title, figure, and whether its scale is logarithmic."""
    found: list[tuple[str, Figure_of, bool]] = [
        ("Q4_0: squared rounding error / squared weights (%)", lambda t: _percent(t.error), False),
        ("the same, every column weighed by its inputs (%)", lambda t: _percent(t.weighted_error), False),
        ("weights: excess kurtosis", lambda t: t.kurtosis, False),
    ]
    if any(tensor.input_share is not None for tensor in report.tensors):
        title = "inputs: energy in the largest 1 % of columns (%)"
        found.append((title, lambda t: _percent(t.input_share), False))
    if report.by_sensitivity:
        found.insert(0, ("nats a token that Q4_0 costs, by gradients", lambda t: t.sensitivity, True))
    return [panel for panel in found if any(panel[1](tensor) is not None for tensor in report.tensors)]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _kinds(tensors: Sequence[TensorFigures]) -> list[str]:
    """Kinds that are in layers, in the order they compute."""
    found = dict.fromkeys(kind_of(tensor.name) for tensor in tensors if layer_of(tensor.name) is not None)
    places = {f"{part}.weight": place for place, part in enumerate(ORDER)}
    return sorted(found, key=lambda kind: places.get(kind, len(ORDER)))


def _values(
    tensors: Sequence[TensorFigures], rows: Sequence[str], layers: Sequence[int], of: Figure_of
) -> np.ndarray:
    """(rows, layers); a tensor of no layer fills its row."""
    found = np.full((len(rows), len(layers)), np.nan)
    for tensor in tensors:
        value, layer = of(tensor), layer_of(tensor.name)
        if value is None:
            continue
        columns = slice(None) if layer is None else layers.index(layer)
        found[rows.index(kind_of(tensor.name)), columns] = value
    return found


def _panel(figure: Figure, axes, title: str, values: np.ndarray, *, log: bool) -> None:
    positive = values[np.isfinite(values) & (values > 0)]
    norm = Normalize(np.nanmin(values), np.nanmax(values))
    if log and len(positive):
        norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01))
    axes.set_facecolor(EMPTY)
    image = axes.imshow(values, aspect="auto", cmap=COLOURS, norm=norm, interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, pad=0.01, fraction=0.04)
    bar.ax.tick_params(labelsize=8)
    if log:
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=8))
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        bar.ax.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    else:
        bar.ax.yaxis.set_major_locator(MaxNLocator(4))
    axes.set_title(title, loc="left", fontsize=9.5, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
