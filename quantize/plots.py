"""Plots of a report: divergence against size and against speed, speed against size, as PNG and SVG.

Draws without a display and without global state; decides nothing.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator
from matplotlib.transforms import Bbox

from quantize.report import FileReport, Report
from quantize.steps import write_bytes

INK, ACCENT, OTHER = "#1d2733", "#c2410c", "#2563eb"
FLOOR = 1e-7  # what is drawn for a divergence of nothing, which has no place on a log scale
#: Where a label may stand beside its point, in points of 1/72 inch, best first.
PLACES = tuple(
    (right, up) for right in (9, 30, -45, 55, -75, 85) for up in (5, -13, 20, -28, 36, -44, 52, -60)
)


def divergence_figure(report: Report) -> Figure | None:
    """Mean KLD with its standard error against megabytes, log scale; None when nothing was measured."""
    return _pareto(
        report,
        "file size (MB, 10^6 bytes)",
        "divergence against size",
        lambda file: file.types.size_bytes / 1e6,
        better=-1,
    )


def tradeoff_figure(report: Report) -> Figure | None:
    """Mean KLD against tokens written a second; None when nothing was measured."""
    return _pareto(
        report,
        "tokens written a second, one sequence",
        "divergence against speed",
        lambda file: file.speed.decode,
        better=1,
    )


def _pareto(
    report: Report, xlabel: str, title: str, place: Callable[[FileReport], float], *, better: int
) -> Figure | None:
    """Files that no other one beats in both are joined by a line; `better` is the sign of a better place."""
    series = [
        ("self-written chats", ACCENT, [(f, f.chats) for f in report.files if f.chats]),
        ("public text", OTHER, [(f, f.text) for f in report.files if f.text]),
    ]
    drawn = [(label, colour, points) for label, colour, points in series if points]
    if not drawn:
        return None
    figure, axes = _figure("mean KLD to the source (nats, log scale)")
    axes.set_xlabel(xlabel, color=INK)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    every = [max(d.kl.mean, FLOOR) for _, _, points in drawn for _, d in points]
    axes.set_ylim(min(every) / 2, max(every) * 2)
    for label, colour, points in drawn:
        for marker, size, kind, chosen in (
            ("o", 6, "recipes", [point for point in points if point[0].mix is None]),
            ("D", 5, "within a budget", [point for point in points if point[0].mix is not None]),
        ):
            if chosen:
                xs = [place(file) for file, _ in chosen]
                means = [max(d.kl.mean, FLOOR) for _, d in chosen]
                errors = [
                    min(d.kl.standard_error or 0.0, 0.9 * m) for (_, d), m in zip(chosen, means, strict=True)
                ]
                axes.errorbar(
                    xs, means, errors, fmt=marker, ms=size, capsize=3, color=colour, label=f"{label}, {kind}"
                )
        front = _front([(place(file), max(d.kl.mean, FLOOR)) for file, d in points], better)
        axes.plot(*zip(*front, strict=True), color=colour, lw=1, alpha=0.4)
    axes.legend(frameon=False, loc="upper right" if better < 0 else "upper left", fontsize=9)
    axes.set_title(f"{report.source.name}: {title}", loc="left", color=INK)
    points = drawn[0][2]
    means = [max(d.kl.mean, FLOOR) for _, d in points]
    _label(axes, [file for file, _ in points], [place(f) for f, _ in points], means)
    return figure


def _front(points: Sequence[tuple[float, float]], better: int) -> list[tuple[float, float]]:
    """The points that no other beats in both, best place first."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (-better * point[0], point[1])):
        if not found or y < found[-1][1]:
            found.append((x, y))
    return found


def speed_figure(report: Report) -> Figure:
    """Tokens written a second against megabytes; the source's speed as a line."""
    figure, axes = _figure("tokens written a second, one sequence")
    sizes = [file.types.size_bytes / 1e6 for file in report.files]
    speeds = [file.speed.decode for file in report.files]
    axes.plot(sizes, speeds, "o", ms=6, color=OTHER)
    source = report.source
    axes.axhline(source.speed.decode, color=INK, lw=1, ls="--")
    note = f"source ({source.format}, {source.types.size_bytes / 1e6:.0f} MB)"
    axes.annotate(
        note, (0.99, source.speed.decode), xycoords=("axes fraction", "data"), xytext=(0, 4),
        textcoords="offset points", ha="right", fontsize=9, color=INK,
    )  # fmt: skip
    axes.set_ylim(0, 1.15 * max([*speeds, source.speed.decode]))
    axes.set_title(f"{source.name}: speed against size", loc="left", color=INK)
    _label(axes, report.files, sizes, speeds)
    return figure


def write_figure(figure: Figure, folder: Path, name: str) -> None:
    """`name`.png and `name`.svg, each whole or not at all; laid out once for both."""
    write_bytes(folder / f"{name}.png", png(figure))
    figure.set_layout_engine("none")
    write_bytes(folder / f"{name}.svg", svg(figure))


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
    """Name each point where its label hits no other label and no point; a line leads to those further off."""
    canvas = FigureCanvasAgg(axes.figure)
    axes.figure.draw_without_rendering()  # lays the axes out, so that points have places in pixels
    dots = [line.get_xydata() for line in axes.lines if line.get_marker() in ("o", "D")]
    points = [(x, y) for line in dots for x, y in line]
    taken = [Bbox.from_bounds(x - 8, y - 8, 16, 16) for x, y in axes.transData.transform(points)]
    taken += [Text.get_window_extent(text, canvas.get_renderer()) for text in axes.texts]
    for i in sorted(range(len(files)), key=lambda i: -xs[i]):
        taken.append(_place(axes, files[i].type, (xs[i], ys[i]), taken, canvas))


def _place(axes, text: str, point: tuple[float, float], taken: Sequence[Bbox], canvas) -> Bbox:
    """Put one label at the first free place, the last if none is; returns the box it fills."""
    box = Bbox.null()
    for place in PLACES:
        far = place not in PLACES[:2]
        label = axes.annotate(
            text, point, xytext=place, textcoords="offset points", fontsize=9, color=INK,
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.5, "alpha": 0.5} if far else None,
        )  # fmt: skip
        label.set_in_layout(False)
        label.update_positions(canvas.get_renderer())
        box = Text.get_window_extent(label, canvas.get_renderer()).padded(2)
        inside = (
            axes.bbox.x0 <= box.x0
            and box.x1 <= axes.figure.bbox.x1
            and axes.bbox.y0 <= box.y0
            and box.y1 <= axes.bbox.y1
        )
        if inside and not any(box.overlaps(other) for other in taken):
            return box
        if place != PLACES[-1]:
            label.remove()
    return box
