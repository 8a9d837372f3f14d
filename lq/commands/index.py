"""`lq index` and `lq search`: documents on the command line.

Resolves the embedder and the collection's folder, asks rag, and lays the answer out.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from models.store import Store
    from rag.collection import CollectionInfo
    from rag.embed import Embedder
    from rag.ingest import IndexReport, Progress
    from rag.passage import Passage

DEFAULT_EMBEDDER = "all-minilm-l6-v2"
_SHOWN = 20
_SNIPPET = 300  # characters

Name = Annotated[
    str, typer.Argument(metavar="COLLECTION", help="Name: letters, digits, dots, dashes, underscores.")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; off by default.")]


def register(app: typer.Typer) -> None:
    """Add `lq index` and `lq search`."""
    app.command("index")(index)
    app.command("search")(search)


def index(
    collection: Name,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="Folders and files: txt md html pdf docx csv code."),
    ],
    chunk_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help="Most tokens of a chunk, 100 to 2000; 512 for a new collection."),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(metavar="N", help="Tokens that neighbouring chunks share; 64 for a new collection."),
    ] = None,
    embedder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Embedder: store or catalogue name, or a sentence-transformers folder; "
            f"{DEFAULT_EMBEDDER} for a new collection.",
        ),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Forget what the collection holds first; off by default.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a collection up to its documents: only what is new or edited is read and embedded."""
    from models.store import Store
    from rag import ingest
    from rag.settings import check_chunks

    if chunk_tokens is not None:
        check_chunks(chunk_tokens, overlap or 0)
    store = Store.default()
    directory = _directory(store, collection)
    before = None if embedder else _info(directory)
    loaded = _embedder_of(store, before) if before else load_embedder(store, embedder or DEFAULT_EMBEDDER)
    with _progress() as progress:
        report = ingest.index(
            directory,
            paths,
            embedder=loaded,
            chunk_tokens=chunk_tokens,
            overlap=overlap,
            rebuild=rebuild,
            progress=progress,
        )
    if as_json:
        _print_json(_document(collection, report))
    else:
        _print_report(collection, report)


def search(
    collection: Name,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="The question, in quotes.")],
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Passages to show; 5 by default.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show the passages of a collection that answer a question, best first."""
    from models.store import Store
    from rag.collection import Collection

    store = Store.default()
    opened = Collection.open(_directory(store, collection))
    try:
        passages = opened.search(question, k=k, embedder=_embedder_of(store, opened.info()))
    finally:
        opened.close()
    if as_json:
        rows = [_row(rank, passage) for rank, passage in enumerate(passages, start=1)]
        _print_json({"collection": collection, "question": question, "passages": rows})
        return
    for rank, passage in enumerate(passages, start=1):
        print(f"{rank}. {_place(passage)}  (score {passage.score:.3f})\n   {_snippet(passage)}")
    if not passages:
        print("nothing found")


def load_embedder(store: Store, name: str) -> Embedder:
    """The embedder of a store name or folder; a catalogue name is pulled first."""
    from lq.progress import transfer_progress
    from models.catalog import catalog
    from rag.embed import Embedder

    if name in catalog() and not (store.models / name).is_dir():
        with transfer_progress() as progress:
            store.pull(name, progress=progress)
    path = store.resolve_embedder(name)
    inside = path.parent == store.models
    return Embedder.load(path, name=name if inside else str(path))


def _directory(store: Store, name: str) -> Path:
    from rag.collection import directory_of

    return directory_of(store.root / "collections", name)


def _embedder_of(store: Store, info: CollectionInfo) -> Embedder:
    """The embedder that a collection was built with; LostEmbedder says how to do without it."""
    from models.errors import ModelsError
    from rag.settings import LostEmbedder

    try:
        return load_embedder(store, info.embedder)
    except ModelsError as error:
        raise LostEmbedder(
            info.name, info.roots, info.embedder, instead=DEFAULT_EMBEDDER, why=error
        ) from error


def _info(directory: Path) -> CollectionInfo | None:
    """Of an existing collection."""
    from rag.collection import Collection, UnknownCollection

    try:
        opened = Collection.open(directory)
    except UnknownCollection:
        return None
    try:
        return opened.info()
    finally:
        opened.close()


@contextmanager
def _progress() -> Iterator[Progress | None]:
    """A bar on stderr, drawn on a terminal only."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(
            task, description=escape(what), completed=done, total=total
        )


def _document(collection: str, report: IndexReport) -> dict[str, Any]:
    skipped = [{"path": path, "reason": reason} for path, reason in report.skipped]
    notes = [{"path": path, "note": note} for path, note in report.notes]
    return {"collection": collection} | asdict(report) | {"skipped": skipped, "notes": notes}


def _print_report(collection: str, report: IndexReport) -> None:
    print(
        f"{collection}: {report.added} added, {report.changed} changed, {report.unchanged} unchanged, "
        f"{report.removed} removed, {len(report.skipped)} skipped; {report.chunks} chunks, "
        f"{report.embedded_windows} windows embedded, {report.seconds:.1f} s"
    )
    for what, rows in (("skipped", report.skipped), ("note", report.notes)):
        for path, words in rows[:_SHOWN]:
            print(f"{what} {path}: {words}")
        if len(rows) > _SHOWN:
            print(f"and {len(rows) - _SHOWN} more; --json lists them all")


def _row(rank: int, passage: Passage) -> dict[str, Any]:
    row = asdict(passage)
    del row["pages"]
    return {"rank": rank} | row | {"snippet": passage.snippet}


def _place(passage: Passage) -> str:
    page = passage.page_at(passage.best[0])
    parts = [passage.file if page is None else f"{passage.file}, page {page}", passage.heading]
    return " · ".join(part for part in parts if part)


def _snippet(passage: Passage) -> str:
    text = " ".join(passage.snippet.split())
    return text if len(text) <= _SNIPPET else f"{text[:_SNIPPET].rsplit(' ', 1)[0]} …"


def _print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    print()
