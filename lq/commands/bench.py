"""`lq bench`: prompt and decode speed of one model on this machine, through the engine that serves it."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lq.measure import Load


def register(app: typer.Typer) -> None:
    """Add `lq bench`."""
    app.command()(bench)


def bench(
    model: Annotated[
        str, typer.Argument(help="Store name, catalogue name or GGUF path.")
    ] = "smollm2-135m-instruct",
    streams: Annotated[str, typer.Option(help="Numbers of concurrent requests, by commas.")] = "1,4,8",
    prompt_tokens: Annotated[int, typer.Option(min=8, help="Tokens of each prompt.")] = 256,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens written to each answer.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each row; the median is shown.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; physical cores by default.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure prompt and decode speed of MODEL in tokens/s, with 1, 4 and 8 requests at once."""
    from engine.request import EngineConfig
    from lq.measure import measure
    from lq.progress import transfer_progress
    from models.store import Store

    loads = parse_streams(streams)
    with transfer_progress() as progress:
        path = Store.default().resolve_or_pull(model, progress=progress)
    config = EngineConfig(
        model_path=path, n_ctx=prompt_tokens + tokens + 16, n_parallel=max(loads), n_threads=threads
    )
    info, rows = measure(config, loads=loads, prompt_tokens=prompt_tokens, tokens=tokens, rounds=rounds)
    if as_json:
        document = {"model": path.name, "threads": info.n_threads, "gpu": info.gpu}
        document["loads"] = [row.as_dict() for row in rows]
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        show(f"{path.name}, {info.description}, {info.gpu or f'{info.n_threads} CPU threads'}", rows)


def parse_streams(text: str) -> list[int]:
    """Numbers of concurrent requests from "1,4,8"."""
    try:
        loads = [int(part) for part in text.split(",")]
    except ValueError:
        loads = []
    if not loads or not all(1 <= load <= 64 for load in loads):
        raise typer.BadParameter(
            f"{text!r}: give numbers from 1 to 64 by commas, such as 1,4,8", param_hint="--streams"
        )
    return loads


def show(title: str, rows: list[Load]) -> None:
    """A table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("requests", "prompt tokens/s", "decode tokens/s", "first token, ms"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row.streams), f"{row.prefill_tps:.1f}", f"{row.decode_tps:.1f}", f"{row.ttft_ms:.0f}"
        )
    Console().print(table)
