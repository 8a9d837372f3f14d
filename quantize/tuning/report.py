"""What a run found out, as one record: its JSON, its page, its loss curve.

Owns the wording; measures nothing.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from quantize.divergence import Estimate
from quantize.plots import ACCENT, INK, OTHER
from quantize.tuning.evaluation import Comparison
from quantize.tuning.state import Progressed


@dataclass(frozen=True, slots=True)
class Truncation:
    """What a lower rank cost. `lost`: share of the sum of squares of all singular values."""

    ranks: Mapping[str, int]
    lost: float
    loss_before: float | None  # held out, before the ranks were cut
    loss_after: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """One run. `moved` is the norm of the change over that of the adapted weights."""

    name: str
    source: str
    base: str | None  # the GGUF whose weights were learnt beside, where that is not the source
    distilled: bool
    data: str
    hashes: Mapping[str, str]
    command: str
    options: Mapping[str, Any]
    learnt: Mapping[str, Any]  # facts of `quantize.tuning.encoding`
    held_out: Mapping[str, Any] | None
    training: Progressed
    n_steps: int
    comparison: Comparison | None
    truncation: Truncation | None
    moved: float
    n_trained: int
    n_parameters: int
    n_gguf_bytes: int
    files: Mapping[str, str]  # path below the folder -> sha256
    machine: str
    versions: Mapping[str, str]
    warnings: tuple[str, ...]


def to_json(report: Report) -> str:
    """The whole record."""
    return json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False) + "\n"


def table(report: Report) -> list[tuple[str, str]]:
    """What was measured on the held-out chats, for the page and the terminal."""
    found = report.comparison
    if found is None:
        return []
    divergence = found.divergence
    if report.distilled:
        return [
            ("mean KLD to the source before, nats", shown(found.before)),
            ("mean KLD after", shown(found.after)),
            ("change", shown(found.change)),
            ("same likeliest token as the source", f"{100 * divergence.same_top.mean:.1f} %"),
        ]
    return [
        ("loss before, nats a token", shown(found.before)),
        ("loss after", shown(found.after)),
        ("change", shown(found.change)),
        ("perplexity before and after", f"{np.exp(found.before.mean):.2f}, {np.exp(found.after.mean):.2f}"),
        ("moved from the base: mean KLD, nats", shown(divergence.kl)),
        ("same likeliest token as the base", f"{100 * divergence.same_top.mean:.1f} %"),
    ]


def page(report: Report) -> str:
    """report.md."""
    training = report.training
    rate = training.n_tokens / max(training.seconds, 1e-9)
    lines = [
        f"# {report.name}: a LoRA adapter for {report.source}",
        "",
        *_measured(report),
        "## How it was made",
        "",
        "```sh",
        report.command,
        "```",
        "",
        f"{report.n_steps} steps, {training.n_tokens:,} tokens read and {training.n_learnt:,} of them "
        f"learnt, in {training.seconds:,.0f} s ({rate:,.0f} tokens/s) on {report.machine}. The adapter is "
        f"that of step {training.best_step}. It has {report.n_parameters:,} numbers, of {report.n_trained:,} "
        f"that were trained, and as a GGUF {report.n_gguf_bytes / 1e6:.1f} MB. The "
        f"adapted weights changed by {100 * report.moved:.2f} % (norm of the change over that of the "
        "weights).",
        "",
        *_truncated(report.truncation),
        "![Loss against steps](loss.svg)",
        "",
        "| | learnt from | held out |",
        "|---|---|---|",
        *(_row(label, key, report) for key, label in FACTS.items()),
        "",
        "| option | value |",
        "|---|---|",
        *(f"| {option} | {value} |" for option, value in report.options.items()),
        "",
        "| what | sha256 |",
        "|---|---|",
        *(f"| {what.removesuffix(' sha256')} | `{digest}` |" for what, digest in report.hashes.items()),
        *(f"| {path} | `{digest}` |" for path, digest in report.files.items()),
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in report.versions.items()) + ".",
        "",
        *(f"Note: {warning}\n" for warning in report.warnings),
    ]
    return "\n".join(lines)


FACTS = {
    "n_chats": "chats",
    "n_sequences": "sequences",
    "n_tokens": "tokens",
    "n_learnt": "tokens that count: all but the template's and, of chats, the user's",
    "longest": "longest chat, tokens",
    "n_cut": "cut at --max-length",
    "n_left_out": "left out, nothing that counts within --max-length",
}


def curve(report: Report) -> Figure:
    """Loss of each step's own batch, and of the held-out chats, against steps."""
    figure = Figure(figsize=(8, 5), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    told = report.training
    steps, losses = zip(*told.training, strict=True)
    axes.plot(steps, losses, color=OTHER, alpha=0.35, lw=1, label="training, each step's batch")
    width = max(1, len(losses) // 20)
    if width > 1:
        smooth = np.convolve(losses, np.ones(width) / width, "valid")
        axes.plot(steps[width - 1 :], smooth, color=OTHER, lw=1.5, label=f"training, mean of {width} steps")
    held_out = [(0, report.comparison.before.mean)] if report.comparison else []
    held_out += told.held_out
    if held_out:
        xs, ys = zip(*held_out, strict=True)
        axes.plot(xs, ys, "o-", color=ACCENT, ms=5, label="held out")
        axes.axvline(told.best_step, color=INK, lw=0.8, ls=":", label=f"adapter: step {told.best_step}")
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss (nats a token of the assistant)", color=INK)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(f"{report.name}: loss", loc="left", color=INK)
    return figure


def shown(estimate: Estimate) -> str:
    """A mean, with its standard error where there is one."""
    error = estimate.standard_error
    return f"{estimate.mean:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _measured(report: Report) -> list[str]:
    rows = table(report)
    if not rows or report.held_out is None:
        return ["Nothing was held out (`--held-out 0`), so nothing was measured.", ""]
    head = (
        f"On {report.held_out['n_chats']} held-out chats, {report.held_out['n_learnt']:,} tokens that count "
        "(± is one standard error, chats taken as draws):"
    )
    chosen = "The step was chosen by these same chats, so the loss after is a little flattered."
    flattered = [chosen, ""] if len(report.training.held_out) > 1 else []
    return [
        head,
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        *flattered,
    ]


def _truncated(truncation: Truncation | None) -> list[str]:
    if truncation is None:
        return []
    ranks = sorted(truncation.ranks.values())
    spread = (
        f"{ranks[0]}"
        if ranks[0] == ranks[-1]
        else f"{ranks[0]} to {ranks[-1]} (median {ranks[len(ranks) // 2]})"
    )
    losses = ""
    if truncation.loss_before is not None and truncation.loss_after is not None:
        losses = f" Held-out loss {truncation.loss_before:.4f} before, {truncation.loss_after:.4f} after."
    return [
        f"Its rank was cut to {spread} afterwards, which loses {100 * truncation.lost:.3g} % of the squares "
        f"of the singular values.{losses}",
        "",
    ]


def _row(label: str, key: str, report: Report) -> str:
    held_out = f"{report.held_out[key]:,}" if report.held_out else ""
    return f"| {label} | {report.learnt[key]:,} | {held_out} |"
