"""What leaving out layers cost, as a record and as a section of the card."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quantize.divergence import Divergence, Estimate
from quantize.figures import number, with_error
from quantize.structure.search import Price, Round, Rung, Trial


@dataclass(frozen=True, slots=True)
class PruneReport:
    """`rounds` as they were searched; `chats`, `text`: of the pruned source, not quantized, from the whole.

    `bytes_a_layer`: what a layer takes in a file of `target_bytes`; `share_a_layer`: of all parameters.
    """

    asked: int | str
    n_layer: int
    rounds: tuple[Round, ...]
    price: Price | None
    bytes_a_layer: float
    share_a_layer: float
    chats: Divergence | None
    text: Divergence | None

    @property
    def dropped(self) -> tuple[int, ...]:
        """The source's numbers of the layers that are left out, in the order they went."""
        return tuple(one.taken for one in self.rounds if one.taken is not None)


def report_of(
    facts: Mapping[str, Any], chats: Divergence | None = None, text: Divergence | None = None
) -> PruneReport:
    """From what the step recorded and the divergences of the result."""
    rounds = []
    for one in facts["rounds"]:
        trials = tuple(Trial(t["layer"], t["influence"], Estimate(**t["kl"])) for t in one["trials"])
        rounds.append(Round(tuple(one["before"]), trials, one["taken"]))
    found = facts["price"]
    price = found and Price(
        found["nats_per_byte"], found["target_bytes"], Rung(**found["larger"]), Rung(**found["smaller"])
    )
    return PruneReport(
        asked=facts["asked"],
        n_layer=facts["n_layer"],
        rounds=tuple(rounds),
        price=price or None,
        bytes_a_layer=facts["bytes_a_layer"],
        share_a_layer=facts["share_a_layer"],
        chats=chats,
        text=text,
    )


def sections(report: PruneReport | None) -> Iterable[str]:
    """Paragraphs of markdown."""
    if report is None:
        return
    yield "## Layers"
    yield summary(report)
    yield _table(report)
    yield (
        "Influence is 1 - cos of what goes into a layer and what comes out (ShortGPT). It picks the layers "
        "that are tried; the one without which the model's predictions diverge least goes, and the rest is "
        "tried again. KLD of the trials is on calibration text, from the source in Q8_0."
    )
    judged = (("held-out chats", report.chats), ("the public text", report.text))
    told = [f"{with_error(found.kl)} on {name}" for name, found in judged if found]
    if told and report.dropped:
        yield (
            f"Not quantized, the model without these layers has a KLD from the source of {', '.join(told)}. "
            "All files are made from it; their divergence is measured against the whole source."
        )


def summary(report: PruneReport) -> str:
    """Which layers went, and with `auto` why no more."""
    dropped = ", ".join(str(layer) for layer in report.dropped)
    share = f"{100 * report.share_a_layer:.2f} % of the parameters each"
    if report.asked != "auto":
        return f"Left out of {report.n_layer} layers ({share}): {dropped}, in this order."
    told = f"Left out of {report.n_layer} layers ({share}): {dropped or 'none'}."
    return f"{told} {_comparison(report)}"


def _comparison(report: PruneReport) -> str:
    """Why no more layers went."""
    if not report.rounds or report.rounds[-1].taken is not None:
        return "Half of the layers is the most that `auto` leaves out."
    last = report.rounds[-1]
    if report.price is None:
        return "Smaller types cost nothing measurable here, so no layer is worth leaving out."
    price = report.price
    before = report.rounds[-2].best.kl.mean if len(report.rounds) > 1 else 0.0
    added = last.best.kl.mean - before
    rate = added / report.bytes_a_layer
    saved = price.larger.size_bytes - price.smaller.size_bytes
    return (
        f"Layer {last.best.layer} would be the next: {number(added)} nats for "
        f"{report.bytes_a_layer / 1e6:.2f} MB of a file of {price.target_bytes / 1e6:.1f} MB, "
        f"{number(1e6 * rate)} nats a MB. Smaller types ask for {number(1e6 * price.nats_per_byte)} nats a "
        f"MB there ({price.larger.type} -> {price.smaller.type}: "
        f"{number(price.smaller.kl - price.larger.kl)} nats for {saved / 1e6:.1f} MB), so it stays."
    )


def _table(report: PruneReport) -> str:
    names = ("left out before", "layer", "influence", "KLD without it", "")
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names))]
    for one in report.rounds:
        before = ", ".join(str(layer) for layer in one.before) or "none"
        for trial in sorted(one.trials, key=lambda trial: trial.kl.mean):
            gone = "left out" if trial.layer == one.taken else ""
            cells = (before, f"{trial.layer}", number(trial.influence), with_error(trial.kl), gone)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
