"""`lq serve`: models, assistants and documents behind the OpenAI API."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from models.store import Store
    from server.settings import Model, Settings


def register(app: typer.Typer) -> None:
    """Add `lq serve`."""
    app.command()(serve)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Store names or GGUF paths, one engine each; smollm2-135m-instruct when neither MODEL nor a "
            "configuration file names one.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration file, see examples/lq.toml; none by default."),
    ] = None,
    host: Annotated[
        str | None, typer.Option(metavar="H", help="Address to listen on; 127.0.0.1 by default.")
    ] = None,
    port: Annotated[
        int | None, typer.Option(metavar="P", min=0, max=65535, help="Port; 8000 by default, 0 any free one.")
    ] = None,
    n_ctx: Annotated[
        int | None,
        typer.Option(metavar="N", min=16, help="Tokens of one request, answer included; 4096 by default."),
    ] = None,
    n_parallel: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Requests decoded together; 4 by default.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; the physical cores by default.")
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="F",
            help="File of accepted API keys, one a line; by default LQ_API_KEY, else none.",
        ),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ADAPTER",
            help="LoRA adapter applied to MODEL at load: store name, PEFT folder or GGUF; may be repeated; "
            "none by default.",
        ),
    ] = None,
) -> None:
    """Serve models, and the assistants of a configuration file, until Ctrl-C or SIGTERM."""
    from server.run import serve as serve_settings
    from server.settings import Settings, load, with_models

    settings = load(config) if config else Settings()
    named = named_models(models or [], lora or [])
    key_file = str(api_key_file) if api_key_file else None
    settings = with_models(settings, named, host=host, port=port, api_key_file=key_file)
    settings = with_engine_options(settings, n_ctx=n_ctx, n_parallel=n_parallel, threads=threads)
    serve_settings(settings, store=stocked(settings, with_embedder=True))


def named_models(references: list[str], lora: list[str]) -> dict[str, Model]:
    """Models of the command line by the name that clients will use: the store's, or the file's."""
    from server.settings import DEFAULT_MODEL, Adapter, Model

    if lora and not references:
        references = [DEFAULT_MODEL]
    if lora and len(references) > 1:
        raise typer.BadParameter(
            "with several models, say in lq.toml whose adapter it is", param_hint="--lora"
        )
    adapters = tuple(Adapter(path=each) for each in lora)
    named = {}
    for reference in references:
        name = name_of(reference)
        if name in named:
            raise typer.BadParameter(f"two models would be called {name!r}", param_hint="MODEL")
        named[name] = Model(model=reference, lora=adapters)
    return named


def name_of(reference: str) -> str:
    """A store name as it is; of a path the file's name without .gguf."""
    text = Path(reference).name.removesuffix(".gguf")
    return re.sub(r"[^\w.:-]", "-", text).lstrip("-.:") or "model"


def with_engine_options(settings: Settings, **options: int | None) -> Settings:
    """The settings with options given (not None) set for every model."""
    import msgspec

    given = {name: value for name, value in options.items() if value is not None}
    models = {name: msgspec.structs.replace(each, **given) for name, each in settings.models.items()}
    return msgspec.structs.replace(settings, models=models)


def stocked(settings: Settings, *, with_embedder: bool) -> Store:
    """The store, after the embedded defaults that the settings ask for were pulled into it.

    Without its model nothing can be served. Without the embedder everything but /v1/embeddings can, so that a
    pull of it that fails, at a site without a network, is told and no more.
    """
    from models.errors import ModelsError
    from models.store import Store
    from server.settings import DEFAULT_EMBEDDER, DEFAULT_MODEL

    store = Store.default()
    model = settings.models.get(DEFAULT_MODEL)
    if model is not None and model.model in (None, DEFAULT_MODEL):
        _pulled(store, DEFAULT_MODEL)
    if with_embedder and settings.embedder.model == DEFAULT_EMBEDDER:
        try:
            _pulled(store, DEFAULT_EMBEDDER)
        except (ModelsError, OSError) as error:
            reason = " ".join(str(error).split())
            print(f"warning: /v1/embeddings is not served: {reason}", file=sys.stderr, flush=True)
    return store


def _pulled(store: Store, name: str) -> None:
    """Pull a catalogue name that is not in the store yet."""
    if name not in {entry.name for entry in store.entries()}:
        from lq.progress import transfer_progress

        with transfer_progress() as progress:
            store.pull(name, progress=progress)
