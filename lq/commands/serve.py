"""`lq serve`: models, assistants and documents behind the OpenAI API."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from models.store import Store
    from server.model_settings import Adapter
    from server.settings import Model, Settings


CellType = Literal["auto", "f32", "bf16", "f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
#: Options of what a request gets. They are for models that write text; where none does, for the others.
SHAPE_OPTIONS = ("n_ctx", "n_parallel")


def register(app: typer.Typer) -> None:
    """Add `lq serve`."""
    app.command()(serve)


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Store names or GGUF paths, loaded at start; smollm2-135m-instruct when neither MODEL nor a "
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
        typer.Option(
            metavar="N",
            min=16,
            help="Tokens of one request, answer included; by default what the model was trained on, if "
            "memory allows.",
        ),
    ] = None,
    n_parallel: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Requests decoded together; 8 by default (GPU: 32), if memory allows."
        ),
    ] = None,
    kv_cells: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=16,
            help="Tokens of all requests together; by default n_ctx for each, 8192 at most.",
        ),
    ] = None,
    kv_type_k: Annotated[
        CellType | None,
        typer.Option(
            help="Type of cached keys; auto by default: f16, or q8_0 where the context does not fit with f16 "
            "(q4_0 only for a context that was given). What each costs: lq quantize --kv-cache."
        ),
    ] = None,
    kv_type_v: Annotated[
        CellType | None, typer.Option(help="Type of cached values; auto by default, as for keys.")
    ] = None,
    gpu_layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            help="Layers on the GPU, the output head being one; as many as fit by default, 0: none.",
        ),
    ] = None,
    mmap: Annotated[
        bool | None,
        typer.Option(
            "--mmap/--no-mmap",
            help="Weights stay in the file's pages; by default when memory is short or a GPU holds them.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="CPU threads; the physical cores by default.")
    ] = None,
    memory_budget_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MIB",
            min=1,
            help="Memory of all loaded models together; 80 % of what is free at start by default.",
        ),
    ] = None,
    gpu_memory_budget_mb: Annotated[
        float | None,
        typer.Option(
            metavar="MIB",
            min=1,
            help="The same of the GPU's own memory; 90 % of what is free at start by default.",
        ),
    ] = None,
    keep_alive: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help='Unload a model after so long without a request: "10m", "90s", "0", "forever"; by default '
            "forever if it was loaded at start, else 10m.",
        ),
    ] = None,
    preload: Annotated[
        bool | None,
        typer.Option(
            "--preload/--no-preload",
            help="Load at start; by default what is named here, or the only model. Others load on first use.",
        ),
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Requests of a model that may wait; more get 429; 256 by default."
        ),
    ] = None,
    max_stall_ms: Annotated[
        int | None,
        typer.Option(
            metavar="MS", min=10, help="Longest wait of running answers for another's prompt; 250 by default."
        ),
    ] = None,
    cache_ram_mb: Annotated[
        int | None,
        typer.Option(
            metavar="MIB", min=0, help="Memory for prefixes beside the context; 512 by default, 0: none."
        ),
    ] = None,
    cache_disk_mb: Annotated[
        int | None,
        typer.Option(
            metavar="MIB", min=0, help="Disk for prefixes, kept over restarts; 0, none, by default."
        ),
    ] = None,
    speculation: Annotated[
        Literal["auto", "off"] | None,
        typer.Option(help="Draft the next tokens where that is measured to pay; auto by default."),
    ] = None,
    draft_model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Small model of the same vocabulary that drafts: store name or GGUF; none by default.",
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="F",
            help="File of accepted API keys, one a line; by default LQ_API_KEY, else none.",
        ),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ADAPTER",
            help="LoRA adapter loaded beside MODEL for requests with `adapter`: NAME; store name, PEFT "
            "folder or GGUF; may be repeated; none by default.",
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
    named = named_models(models or [], lora or [], adapter or [])
    key_file = str(api_key_file) if api_key_file else None
    settings = with_models(
        settings, named, host=host, port=port, api_key_file=key_file, memory_budget_mb=memory_budget_mb,
        gpu_memory_budget_mb=gpu_memory_budget_mb,
    )  # fmt: skip
    store = stocked(settings, with_embedder=True)
    settings = with_engine_options(
        settings, store, n_ctx=n_ctx, n_parallel=n_parallel, kv_cells=kv_cells, kv_type_k=kv_type_k,
        kv_type_v=kv_type_v, gpu_layers=gpu_layers, mmap=mmap, threads=threads, keep_alive=keep_alive,
        preload=preload, max_queue=max_queue, max_stall_ms=max_stall_ms, cache_ram_mb=cache_ram_mb,
        cache_disk_mb=cache_disk_mb, speculation=speculation, draft_model=draft_model,
    )  # fmt: skip
    serve_settings(settings, store=store)


def named_models(references: list[str], lora: list[str], beside: Sequence[str] = ()) -> dict[str, Model]:
    """Models of the command line by the name that clients will use: the store's, or the file's."""
    from server.settings import DEFAULT_MODEL, Adapter, Model

    if (lora or beside) and not references:
        references = [DEFAULT_MODEL]
    if (lora or beside) and len(references) > 1:
        option = "--lora" if lora else "--adapter"
        raise typer.BadParameter("with several models, say in lq.toml whose adapter it is", param_hint=option)
    adapters = tuple(Adapter(path=each) for each in lora)
    named = {}
    for reference in references:
        name = name_of(reference)
        if name in named:
            raise typer.BadParameter(f"two models would be called {name!r}", param_hint="MODEL")
        named[name] = Model(model=reference, lora=adapters, adapters=named_adapters(beside), preload=True)
    return named


def named_adapters(texts: Sequence[str]) -> dict[str, str | Adapter]:
    """Adapters by the name that requests will use, from NAME=ADAPTER."""
    from server.model_settings import ADAPTER_NAME, Adapter

    found: dict[str, str | Adapter] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not (equals and path and ADAPTER_NAME.fullmatch(name)):
            raise typer.BadParameter(
                f"{text!r}: give NAME=ADAPTER, such as legal=out/legal", param_hint="--adapter"
            )
        if name in found:
            raise typer.BadParameter(f"two adapters would be called {name!r}", param_hint="--adapter")
        found[name] = Adapter(path=path)
    return found


def name_of(reference: str) -> str:
    """A store name as it is; of a path the file's name without .gguf."""
    text = Path(reference).name.removesuffix(".gguf")
    return re.sub(r"[^\w.:-]", "-", text).lstrip("-.:") or "model"


def with_engine_options(settings: Settings, store: Store, **options: Any) -> Settings:
    """The settings with options given (not None) set for every model that has a use for them."""
    import msgspec

    from server.settings import with_options

    given = {name: value for name, value in options.items() if value is not None}
    wanted = of_each(settings, store, given)
    models = {}
    for name, model in settings.models.items():
        models[name] = with_options(model, wanted[name])
    return msgspec.structs.replace(settings, models=models)


def of_each(settings: Settings, store: Store, given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The options for each model. Those of text go to models that write it; where none does, to all of them.

    Files are read only for such options, to know which models write.
    """
    from server.engines import kind_of
    from server.pooled import TEXT_OPTIONS

    models = settings.models
    for_all = {name: value for name, value in given.items() if name not in (*TEXT_OPTIONS, *SHAPE_OPTIONS)}
    if for_all == given:
        return dict.fromkeys(models, given)
    writing = {name for name, model in models.items() if kind_of(name, model, store) == "text"}
    return {name: given if name in writing or not writing else for_all for name in models}


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
