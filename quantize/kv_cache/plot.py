"""The plot of a KV-cache report: divergence of every pair of types, with its error, pairs by their bytes.

Draws without a display and without global state.
"""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from quantize.kv_cache.report import CacheReport, PairReport

INK = "#1d2733"
#: Which part of the cache is rounded, and in which colour and mark it is drawn.
KINDS = {
    "keys alone": ("#2563eb", "o"),
    "values alone": ("#c2410c", "s"),
    "keys and values": ("#15803d", "D"),
}
FLOOR = 1e-7  # what is drawn for a divergence of nothing, which has no place on a log scale


def kind_of(pair: PairReport) -> str:
    """Which part of the cache is rounded."""
    if pair.type_v == "f16":
        return "keys alone"
    return "values alone" if pair.type_k == "f16" else "keys and values"


def cache_figure(report: CacheReport) -> Figure:
    """Mean KLD to the same file with f16 cells on the first text, a line a pair, the smallest below."""
    text = next(iter(report.texts))
    rows = sorted(
        (pair for pair in report.pairs if not pair.is_exact),
        key=lambda pair: (pair.bytes_per_token, -pair.from_f16[text].kl.mean),
    )
    figure = Figure(figsize=(8, 1.6 + 0.24 * len(rows)), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    for kind, (colour, mark) in KINDS.items():
        places = [place for place, pair in enumerate(rows) if kind_of(pair) == kind]
        means = [max(rows[place].from_f16[text].kl.mean, FLOOR) for place in places]
        errors = [rows[place].from_f16[text].kl.standard_error or 0.0 for place in places]
        errors = [min(error, 0.9 * mean) for error, mean in zip(errors, means, strict=True)]
        axes.errorbar(means, places, xerr=errors, fmt=mark, ms=5, capsize=2.5, color=colour, label=kind)
    names = [f"{pair.label}  {pair.bytes_per_token:,}" for pair in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8.5, color=INK)
    _mark_best(axes, rows, report)
    _lines(axes, report, text)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    axes.set_xlabel(f"mean KLD to f16 cells, on {report.texts[text]} (nats, log scale)", color=INK)
    axes.set_ylabel("keys / values, bytes a token", color=INK)
    axes.set_title(f"{report.file}: KV-cache types", loc="left", color=INK)
    axes.grid(True, axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.03)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3)
    return figure


def _mark_best(axes, rows: list[PairReport], report: CacheReport) -> None:
    for place, pair in enumerate(rows):
        if (pair.type_k, pair.type_v) == report.recommended:
            axes.axhspan(place - 0.5, place + 0.5, color=KINDS["keys and values"][0], alpha=0.12, lw=0)


def _lines(axes, report: CacheReport, text: str) -> None:
    """What rounding the weights has cost, and what any other rounding of sums does."""
    weights, floor = report.exact.from_source[text].kl.mean, report.floor[text].kl.mean
    for value, told, style in ((weights, "the weights' cost", "-"), (floor, "floor", "--")):
        if value <= 0:
            continue
        axes.axvline(value, color=INK, lw=1, ls=style, alpha=0.7)
        axes.annotate(
            told, (value, 1), xycoords=("data", "axes fraction"), xytext=(-3, -4), rotation=90,
            textcoords="offset points", ha="right", va="top", fontsize=8, color=INK,
        )  # fmt: skip
