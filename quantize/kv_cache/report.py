"""What was found out about a file's KV cache, as a record and as a section of the card.

Owns the words and the table; measuring is `quantize.kv_cache.steps`'s.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from quantize.divergence import Divergence, Estimate
from quantize.figures import with_error
from quantize.kv_cache.pairs import EXACT, SHARE, Pair

COLUMNS = (
    "keys", "values", "bytes a token", "of f16", "KLD to f16 cells", "same top token", "KLD to source",
    "added to that",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class PairReport:
    """A pair of types: divergences by text, from the same file with f16 cells and from the source.

    The one of f16 with f16 from itself is left out. `added`: the divergence from the source less that of f16
    cells, token by token.
    """

    type_k: str
    type_v: str
    bytes_per_token: int
    from_f16: Mapping[str, Divergence]
    from_source: Mapping[str, Divergence]
    added: Mapping[str, Estimate]

    @property
    def label(self) -> str:
        """Keys, then values."""
        return f"{self.type_k} / {self.type_v}"

    @property
    def is_exact(self) -> bool:
        """Whether this is what the others are compared with."""
        return (self.type_k, self.type_v) == EXACT


@dataclass(frozen=True, slots=True)
class CacheReport:
    """One file with each pair of types. `texts`: name -> what it is called; the first one decides.

    `floor`: divergence by text of f16 cells from themselves, where sums are rounded otherwise: less than that
    says nothing about a type. `limit`: what a pair may add to the divergence from the source, in nats.
    `tokens_written`: tokens a second by pair, where timed.
    """

    file: str
    texts: Mapping[str, str]
    n_scored: Mapping[str, int]
    pairs: tuple[PairReport, ...]
    floor: Mapping[str, Divergence]
    limit: float
    recommended: Pair | None
    on_gpu: bool
    tokens_written: Mapping[str, float]

    @property
    def exact(self) -> PairReport:
        """The pair that the others are compared with."""
        return next(pair for pair in self.pairs if pair.is_exact)

    @property
    def best(self) -> PairReport | None:
        """The recommended pair."""
        found = [pair for pair in self.pairs if (pair.type_k, pair.type_v) == self.recommended]
        return found[0] if found else None


def sections(report: CacheReport | None) -> Iterable[str]:
    """Paragraphs of markdown."""
    if report is None:
        return
    yield "## KV cache"
    scored = ", ".join(f"{report.n_scored[name]} tokens of {told}" for name, told in report.texts.items())
    yield (
        f"{report.file} with cached keys and values of each type, on {scored}: against the same file with "
        "f16 cells, and against the source. Types on the keys alone and on the values alone come first, then "
        "the pairs that their sums promise most for. Measured as `lq serve` computes: f16 cells by its own "
        "attention on the CPU, all others by llama.cpp's."
    )
    yield (
        "The floor is what f16 cells diverge from themselves where attention sums in 64 bits: quantized "
        "weights round their inputs, too, and any other rounding before them moves the predictions. Such "
        "noise is no loss; what is lost is what a pair adds to the divergence from the source."
    )
    for name, told in report.texts.items():
        yield f"On {told}:"
        yield table(report, name)
    yield advice(report)
    yield "![Divergence by type of the KV cache](kv-cache.png)"


def table(report: CacheReport, text: str) -> str:
    """One text's lines, in the order of measuring."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS))]
    floor = report.floor[text]
    told = ("-", "-", with_error(floor.kl), f"{100 * floor.same_top.mean:.2f} %", "-", "-")
    lines.append("| " + " | ".join(("floor", "f16", *told)) + " |")
    for pair in report.pairs:
        own = pair.from_f16.get(text)
        share = f"{100 * pair.bytes_per_token / report.exact.bytes_per_token:.0f} %"
        measured = ("0", "100 %") if own is None else (with_error(own.kl), f"{100 * own.same_top.mean:.2f} %")
        cells = (pair.type_k, pair.type_v, f"{pair.bytes_per_token}", share, *measured)
        more = "0" if pair.is_exact else with_error(pair.added[text])
        lines.append("| " + " | ".join((*cells, with_error(pair.from_source[text].kl), more)) + " |")
    return "\n".join(lines)


def advice(report: CacheReport) -> str:
    """What to give `lq serve`, and why."""
    exact, best = report.exact, report.best
    limit = f"{100 * SHARE:.0f} % of what rounding the weights cost ({_plain(report.limit)} nats)"
    gpu = " On a GPU only equal types of both are counted, q8_0 or q4_0: others have no attention there."
    gpu = gpu if report.on_gpu else ""
    if best is None:
        return (
            f"**Recommended: `lq serve {report.file} --kv-type-k f16 --kv-type-v f16`** "
            f"({exact.bytes_per_token} bytes a token). Every smaller pair costs more than {limit}.{gpu}"
        )
    speeds = [
        f"{label} writes {rate:.0f} tokens a second" for label, rate in report.tokens_written.items() if rate
    ]
    told = f" Here {', '.join(speeds)} (short context)." if speeds else ""
    return (
        f"**Where memory decides: `lq serve {report.file} --kv-type-k {best.type_k} --kv-type-v "
        f"{best.type_v}`**: {best.bytes_per_token} bytes a token instead of {exact.bytes_per_token}, the "
        f"smallest pair that costs no more than {limit}, one standard error included.{gpu} Where the context "
        f"fits with f16 cells, leave both at auto: that loses nothing, and on a CPU it is the fastest.{told}"
    )


def _plain(value: float) -> str:
    """Two significant digits without an exponent."""
    if value <= 0 or not math.isfinite(value):
        return f"{value:.0f}"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"
