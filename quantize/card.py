"""The model card: report.md, ready for a hub.

Lays a `Report` out as markdown with front matter; decides nothing.
"""

from collections.abc import Iterable, Sequence

import yaml

from quantize.divergence import Divergence
from quantize.figures import COLUMNS, number, row, with_error
from quantize.report import FileReport, Report, TextReport


def card(report: Report) -> str:
    """The whole card."""
    parts = [
        _front_matter(report),
        f"# {report.source.name}: GGUF, calibrated and measured",
        _introduction(report),
        "## Files",
        _files(report),
        *_measurements(report),
        "## What is inside",
        _type_maps(report.files),
        *_warnings(report),
        "## How it was made",
        _making(report),
        "## Reproduce",
        _reproduce(report),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(report: Report) -> str:
    values = {
        "license": report.source.licence,
        "base_model": report.source.base_model,
        "base_model_relation": "quantized" if report.source.base_model else None,
        "library_name": "gguf",
        "pipeline_tag": "text-generation",
        "quantized_by": "lq",
        "tags": ["gguf", "quantized", "imatrix"] if report.calibration else ["gguf", "quantized"],
    }
    known = {key: value for key, value in values.items() if value}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---"


def _introduction(report: Report) -> str:
    source = report.source
    merged = f" with the adapter {source.adapter} merged in" if source.adapter else ""
    return (
        f"Quantizations of {source.given}{merged} ({source.architecture}, "
        f"{source.types.n_parameters / 1e6:.1f} M parameters, {source.format} source of "
        f"{source.types.size_bytes / 1e6:.1f} MB). Any llama.cpp reads them; `lq serve FILE` serves one "
        "behind the OpenAI API. Divergence is measured against the source itself, on the same backend."
    )


def _files(report: Report) -> str:
    rows = [
        (f"[{f.file}]({f.file})", f"{f.types.size_bytes / 1e6:.1f}", f"`{f.sha256}`") for f in report.files
    ]
    return _table(("file", "MB", "SHA-256"), rows)


def _measurements(report: Report) -> Iterable[str]:
    chats = [(file, file.chats) for file in report.files]
    text = [(file, file.text) for file in report.files]
    yield "## Measured"
    if report.evaluation:
        yield f"On {_described(report.evaluation)}; the assistant's tokens are scored."
    if report.evaluation or not report.text:
        yield _measured_table(chats)
    if report.text:
        yield f"On {_described(report.text)}; the second half of each window is scored."
        yield _measured_table(text)
    yield (
        f"Speed: one sequence, {report.n_threads} threads, {report.machine}, beside whatever else it did. "
        f"The source writes {report.source.speed.decode:.0f} and reads {report.source.speed.prefill:.0f} "
        "tokens a second. KLD is in nats; ± is one standard error, clustered by sequence."
    )
    if any(file.chats or file.text for file in report.files):
        yield "![Divergence against size](divergence.png)"
        yield "![Speed against size](speed.png)"


def _measured_table(files: Sequence[tuple[FileReport, Divergence | None]]) -> str:
    table = _table(COLUMNS, [row(file, divergence) for file, divergence in files])
    details = [
        (
            file.type,
            number(d.kl_90),
            number(d.kl_999),
            number(d.kl_max),
            f"{100 * d.delta_p_rms:.2f} %",
            with_error(d.perplexity_ratio),
            f"{d.perplexity_reference:.3f}",
            f"{d.perplexity:.3f}",
        )
        for file, d in files
        if d
    ]
    if not details:
        return table
    names = ("type", "90 %", "99.9 %", "max", "RMS Δp", "PPL ratio", "PPL source", "PPL")
    return f"{table}\n\n{_table(names, details)}"


def _type_maps(files: Sequence[FileReport]) -> str:
    rows = []
    for file in files:
        total = file.types.n_parameters
        shares = ", ".join(
            f"{s.type} {100 * s.n_parameters / total:.1f} % ({s.n_tensors})" for s in file.types.shares
        )
        rows.append((file.type, f"{file.types.bits_per_weight:.3f}", shares))
    return _table(("type", "bits/weight", "share of parameters (tensors)"), rows)


def _warnings(report: Report) -> Iterable[str]:
    if report.warnings:
        yield "## Know this"
        yield "\n".join(f"- {warning}" for warning in report.warnings)


def _making(report: Report) -> str:
    lines = []
    if report.calibration:
        lines.append(f"- Calibration: {_described(report.calibration)}.{_dropped(report.calibration)}")
        lines.append(
            "- Importance: mean squared inputs of every weight, the embedding included (imatrix.gguf)."
        )
    else:
        lines.append("- Calibration: none; all weights count alike.")
    if report.evaluation:
        lines.append(
            f"- Evaluation: {_described(report.evaluation)}, other seeds.{_dropped(report.evaluation)}"
        )
    return "\n".join(lines)


def _described(text: TextReport) -> str:
    scored = f" ({text.n_scored} scored)" if text.n_scored else ""
    return f"{text.n_sequences} sequences of {text.n_tokens} tokens in all{scored}, {text.origin}"


def _dropped(text: TextReport) -> str:
    if not text.dropped:
        return ""
    return " Dropped: " + ", ".join(f"{count} {reason}" for reason, count in text.dropped.items()) + "."


def _reproduce(report: Report) -> str:
    hashes = [("source", report.source.sha256), ("imatrix.gguf", report.importance_sha256)]
    texts = (("calibration", report.calibration), ("evaluation", report.evaluation), ("text", report.text))
    hashes += [(name, text.sha256) for name, text in texts if text]
    lines = [f"- {name}: `{value}`" for name, value in hashes if value]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    minutes = sum(report.seconds.values()) / 60
    command = f"```sh\n{report.command}\n```"
    return (
        f"{command}\n\nSeed {report.seed}; {versions}; {minutes:.1f} minutes on this machine. SHA-256:\n\n"
        + "\n".join(lines)
    )


def _table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (names, ["---"] * len(names), *rows)]
    return "\n".join(lines)
