"""Two plots of a report: divergence against size, and speed against size, as PNG and SVG bytes.

Draws without a display and without global state; decides nothing.
"""

import io
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from quantize.report import FileReport, Report

INK, ACCENT, OTHER = "#1d2733", "#c2410c", "#2563eb"
#: Where the labels of neighbouring points go, in turn, so that they do not lie upon each other.
OFFSETS = ((7, 7), (7, -14))


def divergence_figure(report: Report) -> Figure | None:
    """Mean KLD with its standard error against megabytes, log scale; None when nothing was measured."""
    series = [
        ("self-written chats", ACCENT, [(f, f.chats) for f in report.files if f.chats]),
        ("public text", OTHER, [(f, f.text) for f in report.files if f.text]),
    ]
    drawn = [(label, colour, points) for label, colour, points in series if points]
    if not drawn:
        return None
    figure, axes = _figure("mean KLD to the source (nats, log scale)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    for i, (label, colour, points) in enumerate(drawn):
        sizes = [file.types.size_bytes / 1e6 for file, _ in points]
        means = [max(d.kl.mean, 1e-7) for _, d in points]
        errors = [min(d.kl.standard_error or 0.0, 0.9 * m) for (_, d), m in zip(points, means, strict=True)]
        axes.errorbar(sizes, means, errors, fmt="o", ms=6, capsize=3, color=colour, label=label)
        if i == 0:
            _label(axes, [file for file, _ in points], sizes, means)
    axes.legend(frameon=False, loc="upper right")
    axes.set_title(f"{report.source.name}: divergence against size", loc="left", color=INK)
    return figure


def speed_figure(report: Report) -> Figure:
    """Tokens written a second against megabytes; the source's speed as a line."""
    figure, axes = _figure("tokens written a second, one sequence")
    sizes = [file.types.size_bytes / 1e6 for file in report.files]
    speeds = [file.speed.decode for file in report.files]
    axes.plot(sizes, speeds, "o", ms=6, color=OTHER)
    _label(axes, report.files, sizes, speeds)
    source = report.source
    axes.axhline(source.speed.decode, color=INK, lw=1, ls="--")
    note = f"source ({source.format}, {source.types.size_bytes / 1e6:.0f} MB)"
    axes.annotate(
        note, (0.99, source.speed.decode), xycoords=("axes fraction", "data"), xytext=(0, 4),
        textcoords="offset points", ha="right", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_ylim(0, 1.15 * max([*speeds, source.speed.decode]))
    axes.set_title(f"{source.name}: speed against size", loc="left", color=INK)
    return figure


def png(figure: Figure) -> bytes:
    """Pixels at 144 dots an inch."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """Vectors, text kept as text's outlines."""
    buffer = io.BytesIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return buffer.getvalue()


def _figure(ylabel: str):
    figure = Figure(figsize=(8, 5), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel("file size (MB, 10^6 bytes)", color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12, y=0.12)
    return figure, axes


def _label(axes, files: Sequence[FileReport], xs: Sequence[float], ys: Sequence[float]) -> None:
    """Name each point, above and below in turn along the axis."""
    order = sorted(range(len(files)), key=lambda i: (xs[i], ys[i]))
    for turn, i in enumerate(order):
        axes.annotate(
            files[i].type, (xs[i], ys[i]), xytext=OFFSETS[turn % 2], textcoords="offset points",
            fontsize=9, color=INK,
        )  # fmt: skip
