"""The model card: report.md, ready for a hub.

Lays a `Report` out as markdown with front matter; decides nothing.
"""

import html
from collections.abc import Iterable, Sequence

import yaml

from quantize.divergence import Divergence
from quantize.figures import COLUMNS, RECOVERY_COLUMNS, number, recovery_row, row, with_error
from quantize.mixes import chart
from quantize.report import FileReport, Report, TextReport
from quantize.structure import report as structure


def card(report: Report) -> str:
    """The whole card."""
    parts = [
        _front_matter(report),
        f"# {report.source.name}: GGUF, calibrated and measured",
        _introduction(report),
        "## Files",
        _files(report),
        *_measurements(report),
        *_recoveries(report),
        "## What is inside",
        _type_maps(report.files),
        *_mixes(report),
        *_transforms(report),
        *(structure.sections(report.structure) if report.structure else ()),
        *_samples(report),
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
        yield "![Divergence against speed](tradeoff.png)"
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


def _recoveries(report: Report) -> Iterable[str]:
    """What training after rounding gave, file by file."""
    trained = [file for file in report.files if file.recovery]
    if not trained:
        return
    yield "## Recovered"
    yield (
        "After rounding, norms, biases and the float16 scales of blocks were trained on more text of the "
        "calibration's kind to predict what the source does; types, sizes and codes stay. Mean KLD before "
        "and after:"
    )
    yield _table(RECOVERY_COLUMNS, [recovery_row(file) for file in trained])


def _type_maps(files: Sequence[FileReport]) -> str:
    rows = []
    for file in files:
        total = file.types.n_parameters
        shares = ", ".join(
            f"{s.type} {100 * s.n_parameters / total:.1f} % ({s.n_tensors})" for s in file.types.shares
        )
        rows.append((file.type, f"{file.types.bits_per_weight:.3f}", shares))
    return _table(("type", "bits/weight", "share of parameters (tensors)"), rows)


def _mixes(report: Report) -> Iterable[str]:
    """How the types of files within a budget were chosen, and which tensor has which."""
    for file in report.files:
        if file.mix is None:
            continue
        mix = file.mix
        told = f"Types chosen by what rounding each tensor costs (objective: {mix.objective})"
        if mix.rounding_loss is not None:
            told += (
                f"; rounded with {mix.rounding_loss:.2f} of the loss of round-to-nearest with importance, "
                "geometric mean over tensors"
            )
        if len(mix.compared) > 1:
            alone, again = mix.compared
            told += (
                ". Layers were then rounded in their order, each for what those before it now put out: "
                f"KLD {number(alone)} -> {number(again)} on calibration text, in the middle half of it"
                f"{'' if again < alone else ', so that was not used'}"
            )
        yield f"### {file.type}"
        yield f"{told}. The best few were rounded and measured on calibration text:"
        rows = [
            (
                f"{tried.size_bytes / 1e6:.2f}",
                number(tried.predicted),
                number(tried.measured),
                "chosen" if i == mix.chosen else "",
            )
            for i, tried in enumerate(mix.tried)
        ]
        yield _table(("MB of tensors", "KLD predicted", "KLD measured", ""), rows)
        yield f"![Types of {file.type}](types-{file.type}.png)"
        yield _table(("part", "layers and types"), chart.rows(mix.tensors))


def _transforms(report: Report) -> Iterable[str]:
    """What each change of the source gave that leaves its function as it is."""
    if not report.transforms:
        return
    used = [trial.name for trial in report.transforms if trial.used and trial.gain]
    told = f"Files are made from the source under {max(used, key=len)}" if used else "None is used"
    yield "## Transforms tried"
    yield (
        "Changes that leave the model's function as it is, each rounded and measured on held-back "
        "calibration text. A gain is how many nats lower the divergence is than that of what it is compared "
        f"with, paired by token; what gains less than its standard error is not used. {told}."
    )
    rows = [
        (
            trial.name + (f", {trial.type}" if trial.type else ""),
            trial.rounding,
            number(trial.predicted) if trial.predicted is not None else "",
            with_error(trial.kl) if trial.kl else f"left out: {trial.refused}",
            f"{with_error(trial.gain)} over {trial.compared}" if trial.gain else "",
            f"{trial.size_bytes / 1e6:.2f}" if trial.size_bytes else "",
            f"{trial.seconds:.0f}" if trial.kl else "",
            "yes" if trial.used else "",
        )
        for trial in report.transforms
    ]
    yield _table(("transform", "rounding", "KLD predicted", "KLD", "gain", "MB", "s", "used"), rows)


def _samples(report: Report) -> Iterable[str]:
    """What each file answers, beside the source; greedy, so that files can be told apart."""
    if not report.source.answers:
        return
    yield "## Samples"
    yield (
        "The model's own held-out questions, answered greedily. *Same* counts the tokens before the first "
        "that differs from the source's answer."
    )
    for number_, true in enumerate(report.source.answers):
        yield f"> {_one_line(true.question)}"
        rows = [("source", str(len(true.tokens)), _one_line(true.text))]
        for file in report.files:
            answer = file.answers[number_]
            rows.append((file.type, str(answer.same_as(true)), _one_line(answer.text)))
        yield _table(("file", "same", "answer"), rows)


def _one_line(text: str) -> str:
    """As a cell of a table, or a quotation, shows it: no markup of its own, line ends as a sign."""
    shown = html.escape(text.strip(), quote=False)
    for mark in "\\`*_[]|":
        shown = shown.replace(mark, "\\" + mark)
    return " ⏎ ".join(line.strip() for line in shown.splitlines() if line.strip()) or "(nothing)"


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
