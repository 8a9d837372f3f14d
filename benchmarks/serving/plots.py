"""Bar charts of a run: throughput, time to first token, longest gap; medians, quartiles as whiskers."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.serving.compare import Comparison, Spread
from benchmarks.serving.contest import Result
from benchmarks.serving.report import ModelReport, comparisons
from quantize.plots import ACCENT, INK, OTHER

#: File name -> (title, axis, log scale, figures: the first of them that a scenario shows is drawn).
CHARTS = {
    "throughput": ("tokens/s of all clients together, more is better", "tokens/s", False,
                   ("tokens_per_s", "others_tokens_per_s")),
    "first-token": ("time to first token (95 % of requests), less is better", "seconds (log scale)", True,
                    ("ttft_p95_s", "long_ttft_s")),
    "unchanged": ("with others beside, of that without them; 1 is unchanged", "times (log scale)", True,
                  ("unchanged", "ttft_of_alone")),
    "weights": ("tokens of the first key for one of the second", "tokens", False, ("tokens_ratio",)),
    "memory": ("most memory of all processes", "MB", False, ("peak_mb",)),
    "longest-gap": ("longest gap within a stream, less is better", "seconds (log scale)", True, ("gap_s",)),
}  # fmt: skip


def charts(report: ModelReport) -> dict[str, Figure]:
    """The charts by file name, a set for each pair of servers; without those that would be empty."""
    results = [each for each in report.results if not each.problem]
    pairs = {tuple(each.name for each in result.contestants) for result in results}
    drawn = {}
    for pair in sorted(pairs):
        same = [each for each in results if tuple(c.name for c in each.contestants) == pair]
        suffix = "" if pair[1] == "llama-server" else "-lq"
        for name, (title, axis, log, figures) in CHARTS.items():
            rows = [(each.scenario, row) for each in same if (row := _first(each, figures))]
            if rows:
                heading = f"{report.model.stem}: {title}"
                drawn[name + suffix] = bars(heading, axis, rows, pair, log=log)
    return drawn


def bars(
    title: str, axis: str, rows: Sequence[tuple[str, Comparison]], names: Sequence[str], *, log: bool
) -> Figure:
    """Horizontal bars, two for each scenario, their values written beside them."""
    figure = Figure(figsize=(8, 1.2 + 0.62 * len(rows)), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, colour) in enumerate(zip(names, (ACCENT, OTHER), strict=True)):
        spreads = [row.ours if index == 0 else row.theirs for _, row in rows]
        values = [each.middle if each else 0.0 for each in spreads]
        places = [place + (-0.2, 0.2)[index] for place in range(len(rows))]
        axes.barh(
            places, values, height=0.38, color=colour, label=name, xerr=_whiskers(spreads),
            error_kw={"ecolor": INK, "lw": 1, "capsize": 2},
        )  # fmt: skip
        for place, spread in zip(places, spreads, strict=True):
            axes.annotate(
                _written(spread), (spread.high if spread else 0.0, place), xytext=(4, 0),
                textcoords="offset points", va="center", fontsize=8, color=INK,
            )  # fmt: skip
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        least = min(each.low for _, row in rows for each in (row.ours, row.theirs) if each)
        axes.set_xlim(left=least / 3)  # a bar's length means nothing on this scale; its end does
    axes.set_yticks(range(len(rows)), [scenario for scenario, _ in rows])
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(axis, color=INK)
    axes.set_axisbelow(True)
    axes.grid(True, axis="x", which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    return figure


def _first(result: Result, figures: Sequence[str]) -> Comparison | None:
    """The first of some figures that a scenario shows, if any contestant has it."""
    shown = {row.figure: row for row in comparisons(result)}
    row = next((shown[figure] for figure in figures if figure in shown), None)
    return row if row and (row.ours or row.theirs) else None


def _whiskers(spreads: Sequence[Spread | None]) -> list[list[float]]:
    """Distances from the median down and up."""
    down = [each.middle - each.low if each else 0.0 for each in spreads]
    up = [each.high - each.middle if each else 0.0 for each in spreads]
    return [down, up]


def _written(spread: Spread | None) -> str:
    return "none" if spread is None else f"{spread.middle:.3g}"
