"""/docs: the API as a page that needs nothing from the network, and as OpenAPI.

The wire types are the documentation: requests are decoded by hand, so their schemas are put in here.
"""

import re
from copy import deepcopy
from html import escape
from typing import Any

import msgspec
from litestar import Request
from litestar.openapi.plugins import JsonRenderPlugin, OpenAPIRenderPlugin

from server.schema.chat import ChatCompletion, ChatRequest
from server.schema.completion import Completion, CompletionRequest
from server.schema.embedding import EmbeddingList, EmbeddingRequest
from server.schema.engine import EngineList
from server.schema.model import Model, ModelList
from server.schema.rerank import RerankList, RerankRequest

SPECIFICATION_PATH = "/openapi.json"
TEMPLATE = "#/components/schemas/{name}"
#: path -> (method, request, answer)
WIRE: dict[str, tuple[str, type | None, type]] = {
    "/v1/chat/completions": ("post", ChatRequest, ChatCompletion),
    "/v1/completions": ("post", CompletionRequest, Completion),
    "/v1/embeddings": ("post", EmbeddingRequest, EmbeddingList),
    "/v1/rerank": ("post", RerankRequest, RerankList),
    "/v1/models": ("get", None, ModelList),
    "/v1/models/{model}": ("get", None, Model),
    "/v1/engine": ("get", None, EngineList),
}
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
h3{margin-top:2rem}h2{margin-top:2rem;border-top:1px solid #ddd;padding-top:1rem}
code{background:#f4f4f4;padding:.1em .3em}
td,th{text-align:left;padding:.15rem 1rem .15rem 0;vertical-align:top}th{font-weight:600}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}code{background:#2a2a2a}}
"""


def with_wire_types(schema: dict[str, Any]) -> dict[str, Any]:
    """Litestar's schema with the bodies of requests and answers."""
    full = deepcopy(schema)
    types = {each for _, *pair in WIRE.values() for each in pair if each is not None}
    _, components = msgspec.json.schema_components(types, ref_template=TEMPLATE)
    full.setdefault("components", {}).setdefault("schemas", {}).update(components)
    for path, (method, request, answer) in WIRE.items():
        operation = full["paths"][path][method]
        if request is not None:
            operation["requestBody"] = {"required": True, "content": _content(request)}
        operation.setdefault("responses", {})["200"] = {"description": "Done.", "content": _content(answer)}
    full["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    full["security"] = [{"key": []}]
    return full


def _content(wire_type: type) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": TEMPLATE.format(name=wire_type.__name__)}}}


class Specification(JsonRenderPlugin):
    """The OpenAPI document."""

    def render(self, request: Request, openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        return msgspec.json.encode(with_wire_types(openapi_schema))


class DocumentPage(OpenAPIRenderPlugin):
    """The same for people: a static page without scripts."""

    def render(self, request: Request, openapi_schema: dict[str, Any]) -> bytes:  # noqa: ARG002
        schema = with_wire_types(openapi_schema)
        types = schema["components"]["schemas"]
        parts = [
            f"<!doctype html><html lang=en><meta charset=utf-8><title>lq API</title><style>{STYLE}</style>",
            f"<h1>lq API</h1><p>{_prose(schema['info']['description'])} ",
            f'<a href="/docs{SPECIFICATION_PATH}">OpenAPI document</a></p>',
        ]
        for path, operations in schema["paths"].items():
            for method, operation in operations.items():
                if not path.startswith("/docs"):
                    parts.append(_operation(path, method, operation, types))
        parts += [_type(name, types[name]) for name in _inner_types(types)]
        return "".join(parts).encode()


def _operation(path: str, method: str, operation: dict[str, Any], types: dict[str, Any]) -> str:
    html = (
        f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{_prose(operation.get('description'))}</p>"
    )
    body = operation.get("requestBody")
    if body:
        schema = types[_name(body["content"]["application/json"]["schema"])]
        html += f"<p>{_prose(schema.get('description'))}</p>{_fields(schema)}"
    elif path in WIRE:
        schema = types[WIRE[path][2].__name__]
        html += f"<p>The answer: {_prose(schema.get('description'))}</p>{_fields(schema)}"
    return html


def _inner_types(types: dict[str, Any]) -> list[str]:
    """The types that requests are made of, or answers where nothing is sent, as they are met."""
    found: dict[str, None] = {}
    queue: list[Any] = [types[(request or answer).__name__] for _, request, answer in WIRE.values()]
    while queue:
        each = queue.pop(0)
        if isinstance(each, list):
            queue = each + queue
        elif isinstance(each, dict):
            if "$ref" in each and _name(each) not in found:
                found[_name(each)] = None
                queue.append(types[_name(each)])
            queue = [value for key, value in each.items() if key not in ("discriminator", "default")] + queue
    return list(found)


def _type(name: str, schema: dict[str, Any]) -> str:
    text = _prose(schema.get("description"))
    return f"<h3 id={name}><code>{name}</code></h3><p>{text}</p>{_fields(schema)}"


def _name(reference: dict[str, Any]) -> str:
    return reference["$ref"].rpartition("/")[2]


def _prose(text: str | None) -> str:
    """A docstring as HTML: what stands between backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text or "", quote=False))


def _fields(schema: dict[str, Any]) -> str:
    """Required fields first."""
    required = set(schema.get("required", ()))
    rows = [
        f"<tr><td><code>{escape(name)}</code>{' *' * (name in required)}</td><td>{_kind(field)}</td></tr>"
        for name, field in sorted(schema["properties"].items(), key=lambda pair: pair[0] not in required)
        if field.get("type") != "null"
    ]
    return f"<table><tr><th>field (* required)</th><th>type</th></tr>{''.join(rows)}</table>"


def _kind(field: dict[str, Any]) -> str:
    """The type of a field as HTML; types of ours are links to their place on the page."""
    if "$ref" in field:
        return f'<a href="#{_name(field)}">{_name(field)}</a>'
    if "anyOf" in field:
        return " | ".join(_kind(each) for each in field["anyOf"] if each.get("type") != "null")
    if "enum" in field:
        return escape(" | ".join(repr(each) for each in field["enum"]), quote=False)
    name = str(field.get("type", "any"))
    if name == "array":
        name = f"list of {_kind(field.get('items', {}))}"
    low, high = field.get("minimum"), field.get("maximum")
    if low is None and high is None:
        return name
    return f"{name} {low} or more" if high is None else f"{name} {low} to {high}"
