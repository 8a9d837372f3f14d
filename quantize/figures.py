"""How numbers of a report are written for people.

Owns rounding and units; the card and the terminal table share it.
"""

import math

from quantize.divergence import Divergence, Estimate
from quantize.report import FileReport

COLUMNS = (
    "type", "MB", "bits/weight", "mean KLD", "median", "99 %", "same top token", "PPL ratio", "tok/s write",
    "tok/s read",
)  # fmt: skip


RECOVERY_COLUMNS = ("type", "chats, rounded", "chats", "text, rounded", "text", "held back", "steps", "file")


def recovery_row(file: FileReport) -> tuple[str, ...]:
    """What training did to one file, a cell a column of RECOVERY_COLUMNS."""
    recovery = file.recovery
    if recovery is None:
        return (file.type, *("-",) * 6, "rounded")
    found = (recovery.chats_before, file.chats, recovery.text_before, file.text)
    measured = ("-" if each is None else with_error(each.kl) for each in found)
    judged = " to ".join(number(each.mean) for each in recovery.judged) or "no better"
    steps = f"{recovery.trained.best_step} of {recovery.trained.n_steps}"
    return (file.type, *measured, judged, steps, "trained" if recovery.kept else "rounded")


def row(file: FileReport, divergence: Divergence | None) -> tuple[str, ...]:
    """One line of the table, a cell a column of COLUMNS."""
    measured = ("-",) * 5 if divergence is None else _measured(divergence)
    size = f"{file.types.size_bytes / 1e6:.1f}"
    speeds = (f"{file.speed.decode:.0f}", f"{file.speed.prefill:.0f}")
    return (file.type, size, f"{file.types.bits_per_weight:.2f}", *measured, *speeds)


def _measured(divergence: Divergence) -> tuple[str, ...]:
    top = divergence.same_top
    share = Estimate(100 * top.mean, None if top.standard_error is None else 100 * top.standard_error)
    return (
        with_error(divergence.kl),
        number(divergence.kl_median),
        number(divergence.kl_99),
        f"{with_error(share)} %",
        with_error(divergence.perplexity_ratio),
    )


def with_error(estimate: Estimate) -> str:
    """ "0.0312 ± 0.0008": as many decimals as the error has two digits for."""
    error = estimate.standard_error
    if error is None or not error > 0:
        return number(estimate.mean)
    decimals = min(8, max(0, 1 - math.floor(math.log10(error))))
    return f"{estimate.mean:.{decimals}f} ± {error:.{decimals}f}"


def number(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:.0f}"
    decimals = min(8, max(0, 2 - math.floor(math.log10(abs(value)))))
    return f"{value:.{decimals}f}"
