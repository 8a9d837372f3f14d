"""`lq ask`: one question from the terminal, through a running server or one opened in this process."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx

    from server.settings import Settings


#: Tokens that the answer of a model may have; an assistant has a limit of its own, or none.
ANSWER_TOKENS = 512


class AskError(Exception):
    """The server refused the question or cannot be reached."""


def register(app: typer.Typer) -> None:
    """Add `lq ask`."""
    app.command()(ask)


def ask(
    question: Annotated[str, typer.Argument(help="The question, in quotes.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Model or assistant: name or GGUF path; smollm2-135m-instruct by default, with --server "
            "the first that the server lists.",
        ),
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option(metavar="C", help="Answer from this collection (see lq index); none by default."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="Prompt: name, or file without --server; by default `grounded` with a collection.",
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar="LQ_SERVER",
            help="Ask this running server, such as http://127.0.0.1:8000 (key in LQ_API_KEY); "
            "by default the model is loaded in this process.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Configuration file that names the assistant; none by default."),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="Tokens that the answer may have; an assistant's own number, or 512, by default.",
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(metavar="T", min=0, max=2, help="0 to 2, 0 always takes the likeliest; 0.8 by default."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Makes the answer repeatable; a fresh one by default.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout instead of a stream; off by default.")
    ] = False,
) -> None:
    """Answer QUESTION on the terminal, then show the sources."""
    if server and config:
        raise typer.BadParameter("a running server has its own configuration", param_hint="--config")
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
        "collection": collection,
        "prompt": prompt,
        "temperature": temperature,
        "seed": seed,
    }
    body = {name: value for name, value in body.items() if value is not None}
    asyncio.run(_ask_server(server, body, as_json) if server else _ask_here(config, body, as_json))


async def _ask_server(url: str, body: dict[str, Any], as_json: bool) -> None:
    import httpx

    key = os.environ.get("LQ_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = url.rstrip("/").removesuffix("/v1")
    try:
        # A proxy of the environment reaches other machines; it does not reach this one.
        by_environment = not _is_loopback(httpx.URL(base).host)
        async with httpx.AsyncClient(
            base_url=base, headers=headers, timeout=None, trust_env=by_environment
        ) as client:
            await _answer(client, await _completed(client, body), as_json)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise AskError(
            f"no server answers at {url}: {error or type(error).__name__}; is it running?"
        ) from None


async def _ask_here(config: Path | None, body: dict[str, Any], as_json: bool) -> None:
    """Through the server's own application, without a socket, so that nobody needs a key."""
    import httpx

    from lq.commands.serve import stocked
    from server.app import create_app
    from server.auth import Keys
    from server.in_process import BASE_URL, InProcess
    from server.service import opened

    settings = _settings(config, body)
    async with (
        opened(settings, keys=Keys(()), store=stocked(settings, with_embedder=False)) as service,
        httpx.AsyncClient(
            transport=InProcess(create_app(service)), base_url=BASE_URL, timeout=None
        ) as client,
    ):
        await _answer(client, await _completed(client, body), as_json)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


async def _completed(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The body with what the server's list of models decides: the first of it, the answer's length."""
    response = await client.get("/v1/models")
    await _check(response)
    try:
        kinds = {model["id"]: model.get("kind") for model in response.json()["data"]}
        name = body.get("model") or next(iter(kinds))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise AskError("the server lists no models as OpenAI's API does; check the URL") from None
    limit = {} if kinds.get(name) == "assistant" else {"max_tokens": ANSWER_TOKENS}
    return limit | body | {"model": name}


def _settings(config: Path | None, body: dict[str, Any]):
    """Only the model or assistant that is asked, so that no other is loaded; completes body["model"].

    Nobody embeds through `lq ask`, so the file's embedder need not be there; a collection brings its own.
    """
    from lq.commands.serve import name_of
    from server.settings import DEFAULT_MODEL, HTTP, Model, Settings, load, with_models

    settings = load(config) if config else Settings()
    name = body.setdefault("model", next(iter([*settings.assistants, *settings.models]), DEFAULT_MODEL))
    assistants = {name: settings.assistants[name]} if name in settings.assistants else {}
    base = assistants[name].model if assistants else name
    models = {base: settings.models[base]} if base in settings.models else {}
    http = HTTP(
        prompts=_prompt_folder(body) or settings.server.prompts,
        memory_budget_mb=settings.server.memory_budget_mb,
    )
    settings = Settings(server=http, models=models, assistants=assistants)
    if models:
        return _for_one(with_models(settings, {}))
    body["model"] = name_of(name)
    return _for_one(with_models(settings, {body["model"]: Model(model=name)}))


def _for_one(settings: Settings) -> Settings:
    """One question is asked: nobody is beside it, and nothing is kept for the next one."""
    import msgspec

    models = {
        name: msgspec.structs.replace(model, n_parallel=1, kv_cells=None, cache_ram_mb=0, cache_disk_mb=0)
        for name, model in settings.models.items()
    }
    return msgspec.structs.replace(settings, models=models)


def _prompt_folder(body: dict[str, Any]) -> str | None:
    """The folder of a prompt given as a file; body["prompt"] becomes its name."""
    path = Path(body.get("prompt", ""))
    if path.suffix != ".prompt":
        return None
    body["prompt"] = path.stem
    return str(path.parent)


async def _answer(client: httpx.AsyncClient, body: dict[str, Any], as_json: bool) -> None:
    if as_json:
        response = await client.post("/v1/chat/completions", json=body)
        await _check(response)
        print(json.dumps(_document(response.json()), ensure_ascii=False, indent=2))
        return
    async with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
        await _check(response)
        sources = await _print_stream(response)
    for source in sources:
        print(_line(source))


def _document(answer: dict[str, Any]) -> dict[str, Any]:
    choice = answer["choices"][0]
    return {
        "model": answer["model"],
        "answer": choice["message"]["content"],
        "sources": choice["message"].get("sources", []),
        "finish_reason": choice["finish_reason"],
        "usage": answer["usage"],
    }


async def _print_stream(response: httpx.Response) -> list[dict[str, Any]]:
    """Print the text as it comes; the sources that end it."""
    sources: list[dict[str, Any]] = []
    async for line in response.aiter_lines():
        data = line.removeprefix("data: ")
        if not line.startswith("data: ") or data == "[DONE]":
            continue
        event = json.loads(data)
        if "error" in event:
            raise AskError(event["error"]["message"])
        for choice in event["choices"]:
            delta = choice["delta"]
            sys.stdout.write(delta.get("content") or "")
            sys.stdout.flush()
            sources = delta.get("sources") or sources
    print("\n" if sources else "")
    return sources


def _line(source: dict[str, Any]) -> str:
    place = source["file"] if source["page"] is None else f"{source['file']}, page {source['page']}"
    heading = f", {source['heading']}" if source["heading"] else ""
    span = f"characters {source['start']}-{source['end']}"
    return f"[{source['index']}] {place}{heading} ({span}, score {source['score']:.2f})"


async def _check(response: httpx.Response) -> None:
    """Raise what the server says is wrong."""
    if response.status_code == 200:
        return
    await response.aread()
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"the server answered {response.status_code}, which is not lq's way; check the URL"
    raise AskError(message)
