"""`lq quantize`: a model in, quantized files and a measured report out.

Reads options, shows progress and the table. What happens is quantize.pipeline's.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.store import Store
    from quantize.report import Report
    from quantize.settings import Progress, Settings

Objective = Literal["size", "speed", "balanced"]
DEFAULT_TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,IQ4_NL,Q3_K_M,Q2_K"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("quantize")(quantize)


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Store name; hf:ORG/NAME (pulled first); checkpoint folder; or an F32, F16 or BF16 GGUF.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder for the files and the report.")],
    types: Annotated[
        str | None,
        typer.Option(
            "--types",
            metavar="A,B",
            help=f"Types to make, any that llama.cpp knows; {DEFAULT_TYPES} where no budget is given.",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            "--size",
            metavar="95MB,105MB",
            help="The most faithful files of at most these bytes; none.",
        ),
    ] = None,
    bits_per_weight: Annotated[
        str | None,
        typer.Option(
            "--bits-per-weight",
            metavar="4.5,3.8",
            help="The same by bits a weight, all tensors counted; none.",
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option(
            "--fit",
            help="The same, leaving room for the KV cache on this machine; off by default.",
        ),
    ] = False,
    recover: Annotated[
        bool,
        typer.Option(
            "--recover",
            help="Train norms and block scales after rounding, on more text of its own; off by default.",
        ),
    ] = False,
    objective: Annotated[
        Objective,
        typer.Option(
            "--objective",
            help="What files within a budget are chosen for: closeness alone, or speed here too, for a tenth "
            "more divergence at most (balanced) or twice as much (speed).",
        ),
    ] = "size",
    explore: Annotated[
        str | None,
        typer.Option(
            "--explore",
            metavar="TYPE",
            help="Try scalings, rotations and the like of the source, rounded to a tensor type; none.",
        ),
    ] = None,
    prune_layers: Annotated[
        str | None,
        typer.Option(
            "--prune-layers",
            metavar="N|auto",
            help="Leave out N whole layers, those without which predictions change least; auto: only as many "
            "as cost less for their bytes than smaller types do; none by default.",
        ),
    ] = None,
    kv_cache: Annotated[
        bool,
        typer.Option(
            "--kv-cache",
            help="Measure the file to serve with each type of cached keys and values; off by default.",
        ),
    ] = False,
    lora: Annotated[
        str | None,
        typer.Option("--lora", metavar="ADAPTER", help="PEFT adapter to merge: store name or folder; none."),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="self|none|FILE|self,FILE",
            help="What importance is collected on: text the model writes itself, nothing, a text file, or "
            "half of each: chats that it writes, and a file's text.",
        ),
    ] = "self",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all that the model writes.")] = 0,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", metavar="N", help="Calibration text, in tokens.")
    ] = 24_576,
    eval_tokens: Annotated[
        int, typer.Option("--eval-tokens", metavar="N", help="Tokens scored per kind of held-out text.")
    ] = 8_192,
    eval_text: Annotated[
        Path | None,
        typer.Option("--eval-text", metavar="FILE", help="Text file to measure divergence on as well; none."),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="N", help="Name in the files; by default the source's own."),
    ] = None,
    pre: Annotated[
        str | None,
        typer.Option("--pre", metavar="RULE", help="Splitting rule of a tokenizer that is not recognised."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option("--threads", metavar="N", min=1, help="CPU threads; physical cores by default."),
    ] = None,
    keep_source: Annotated[
        bool, typer.Option("--keep-source", help="Keep the converted full-precision GGUF; off by default.")
    ] = False,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Accept a quantized GGUF as source; off by default.")
    ] = False,
    to_store: Annotated[
        bool, typer.Option("--store", help="Also put the files into the store, as NAME-TYPE; off by default.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print report.json on stdout; off by default.")
    ] = False,
) -> None:
    """Quantize a model, calibrated on its own text, and measure what each file loses.

    A run that is interrupted goes on where it stopped when the same command is given again.
    """
    from models.store import Store
    from quantize.gguf_files.types import parse_types
    from quantize.measure import Backend
    from quantize.mixes.budget import FIT, parse_bits_per_weight, parse_sizes
    from quantize.report import to_json
    from quantize.settings import Settings
    from quantize.source import named, unseen
    from quantize.structure.search import parse_layers

    store = Store.default()
    budgets = (
        *(parse_sizes(size) if size else ()),
        *(parse_bits_per_weight(bits_per_weight) if bits_per_weight else ()),
        *((FIT,) if fit else ()),
    )
    own, beside = _calibration(calibration)
    settings = Settings(
        source=named(unseen(source), name),
        out=out.expanduser().absolute(),
        types=parse_types(types or DEFAULT_TYPES) if types or not budgets else (),
        budgets=budgets,
        objective=objective,
        explore=explore.upper() if explore is not None else None,
        recover=recover,
        prune_layers=parse_layers(prune_layers) if prune_layers is not None else None,
        kv_cache=kv_cache,
        times=store.root / "kernel-times.json",
        adapter=store.resolve_adapter(lora) if lora else None,
        calibration=own,
        calibration_text=beside,
        calibration_tokens=calibration_tokens,
        eval_tokens=eval_tokens,
        eval_text=eval_text.expanduser() if eval_text else None,
        seed=seed,
        pre=pre,
        keep_source=keep_source,
        allow_requantize=allow_requantize,
        backend=Backend(threads),
        command=shlex.join(["lq", *sys.argv[1:]]),
    )
    settings, report = _run(settings, store, name, to_store=to_store)
    print(to_json(report), end="") if as_json else _show(report, settings.out)


def _run(settings: Settings, store: Store, name: str | None, *, to_store: bool) -> tuple[Settings, Report]:
    """Find the source, quantize, store; what cannot work is refused before the step that it would waste."""
    from lq.progress import task_progress
    from models.source import disk_errors
    from quantize import pipeline
    from quantize.source import find, named

    settings.check_options()
    with task_progress() as progress:
        found = named(find(settings.source.given, store=store, progress=progress), name)
        settings = replace(settings, source=found)
        if to_store:
            for kind in settings.labels:
                store.check_free(settings.out / found.file_name(kind), name=found.store_name(kind))
        report = pipeline.run(settings, progress=progress)
        if to_store:
            with disk_errors(store.root):
                _store(store, report, settings, progress)
    return settings, report


def _calibration(text: str) -> tuple[Literal["self", "none"] | Path, Path | None]:
    """What is calibrated on, and the file beside the model's own text: that of `self,FILE`."""
    from quantize.errors import QuantizeError

    if text in ("self", "none"):
        return cast('Literal["self", "none"]', text), None
    if not text.startswith("self,"):
        return Path(text).expanduser(), None
    file = text.removeprefix("self,").strip()
    if not file:
        raise QuantizeError(
            f"--calibration is {text!r}; name the text file after the comma, or give self alone"
        )
    return "self", Path(file).expanduser()


def _store(store: Store, report: Report, settings: Settings, progress: Progress) -> None:
    for file in report.files:
        path, name = settings.out / file.file, settings.source.store_name(file.type)
        store.add(path, name=name, licence=report.source.licence, replace=True, progress=progress)


def _show(report: Report, out: Path) -> None:
    """The table, the warnings and what to do next."""
    from quantize.figures import COLUMNS, RECOVERY_COLUMNS, recovery_row, row
    from quantize.report import recommended

    if report.evaluation:
        _table("on held-out self-written chats", COLUMNS, [row(file, file.chats) for file in report.files])
    if report.text:
        _table(f"on {report.text.origin}", COLUMNS, [row(file, file.text) for file in report.files])
    if recovered := [recovery_row(file) for file in report.files if file.recovery]:
        _table("mean KLD before and after training", RECOVERY_COLUMNS, recovered)
    for warning in report.warnings:
        print(f"note: {warning}")
    for sentence in _structure(report):
        print(f"note: {sentence}")
    print(f"report: {out / 'report.md'}")
    print(f"serve one: lq serve {out / recommended(report.files).file}")


def _structure(report: Report) -> Iterator[str]:
    """What was found out about layers and the KV cache, in a sentence each."""
    from quantize.kv_cache.report import advice
    from quantize.structure.prune_report import summary

    if report.structure and report.structure.layers:
        yield summary(report.structure.layers)
    if report.structure and report.structure.cache:
        yield advice(report.structure.cache).replace("**", "").replace("`", "")


def _table(title: str, names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A drawn table on a terminal, tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
        print(f"# {title}")
        print("\n".join("\t".join(cells) for cells in (names, *rows)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in names:
        table.add_column(column, justify="left" if column == "type" else "right")
    for cells in rows:
        table.add_row(*cells)
    Console().print(table)
