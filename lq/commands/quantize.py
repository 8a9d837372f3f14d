"""`lq quantize`: a model in, quantized files and a measured report out.

Reads options, shows progress and the table. What happens is quantize.pipeline's.
"""

from __future__ import annotations

import shlex
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.store import Store
    from quantize.report import FileReport, Report
    from quantize.settings import Progress, Settings

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
        str, typer.Option("--types", metavar="A,B", help="Types to make, any that llama.cpp knows.")
    ] = DEFAULT_TYPES,
    lora: Annotated[
        str | None,
        typer.Option("--lora", metavar="ADAPTER", help="PEFT adapter to merge: store name or folder; none."),
    ] = None,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="self|none|FILE",
            help="What importance is collected on: chats the model writes itself, nothing, or a text file.",
        ),
    ] = "self",
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of all that the model writes.")] = 0,
    calibration_tokens: Annotated[
        int, typer.Option("--calibration-tokens", metavar="N", help="Calibration text, in tokens.")
    ] = 16_384,
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
    from quantize.measure import Backend
    from quantize.report import to_json
    from quantize.settings import Settings
    from quantize.source import named, unseen
    from quantize.types import parse_types

    store = Store.default()
    settings = Settings(
        source=named(unseen(source), name),
        out=out.expanduser().absolute(),
        types=parse_types(types),
        adapter=store.resolve_adapter(lora) if lora else None,
        calibration=_calibration(calibration),
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
    from models.source import disk_errors
    from quantize import pipeline
    from quantize.source import find, named

    settings.check_options()
    with _progress() as progress:
        found = named(find(settings.source.given, store=store, progress=progress), name)
        settings = replace(settings, source=found)
        if to_store:
            for kind in settings.types:
                store.check_free(settings.out / found.file_name(kind), name=found.store_name(kind))
        report = pipeline.run(settings, progress=progress)
        if to_store:
            with disk_errors(store.root):
                _store(store, report, settings, progress)
    return settings, report


def _calibration(text: str) -> Literal["self", "none"] | Path:
    if text in ("self", "none"):
        return cast('Literal["self", "none"]', text)
    return Path(text).expanduser()


def _store(store: Store, report: Report, settings: Settings, progress: Progress) -> None:
    for file in report.files:
        path, name = settings.out / file.file, settings.source.store_name(file.type)
        store.add(path, name=name, licence=report.source.licence, replace=True, progress=progress)


def _show(report: Report, out: Path) -> None:
    """The table, the warnings and what to do next."""
    from quantize.figures import COLUMNS, row

    if report.evaluation:
        _table("on held-out self-written chats", COLUMNS, [row(file, file.chats) for file in report.files])
    if report.text:
        _table(f"on {report.text.origin}", COLUMNS, [row(file, file.text) for file in report.files])
    for warning in report.warnings:
        print(f"note: {warning}")
    print(f"report: {out / 'report.md'}")
    print(f"serve one: lq serve {out / _recommended(report.files).file}")


def _recommended(files: tuple[FileReport, ...]) -> FileReport:
    """The smallest file that is still close to the source (mean KLD under 0.1), else the closest."""
    measured = [(file.divergence.kl.mean, file) for file in files if file.divergence]
    close = [file for mean, file in measured if mean < 0.1]
    if close:
        return min(close, key=lambda file: file.types.size_bytes)
    return min(measured, key=lambda pair: pair[0])[1] if measured else files[0]


def _table(title: str, names: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A drawn table on a terminal, tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
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


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for what is being done, on stderr, where that is a terminal; else one line a task."""
    if not sys.stderr.isatty():
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)
        current = ""

        def show(what: str, done: int, total: int | None) -> None:
            nonlocal current
            heading = what.partition(":")[0]
            if heading != current:
                current = heading
                bars.reset(task, total=total, description=what)
            bars.update(task, description=what[:60], completed=done, total=total)

        yield show


class _Lines:
    """Progress where no one watches: each task is named once on stderr."""

    def __init__(self) -> None:
        self.current = ""

    def __call__(self, what: str, _done: int, _total: int | None) -> None:
        heading = what.partition(":")[0]
        if heading != self.current:
            self.current = heading
            print(heading, file=sys.stderr, flush=True)
