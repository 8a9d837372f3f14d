"""Every failure of a request in one table: exception -> status, OpenAI type and code, headers.

Light: knows the exceptions of the floors below and nothing of Litestar.
"""

import logging
import math
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from engine.request import (
    ContextOverflow,
    EngineError,
    EngineRestarted,
    EngineUnavailable,
    InvalidRequest,
    QueueFull,
)
from models.errors import ModelsError
from models.placement import Bytes
from prompts.errors import PromptError
from rag.collection import InvalidName, UnknownCollection
from rag.errors import RagError

LOG = logging.getLogger("lq.server")

#: Seconds after which a client may come back when the engine is being started again, and when that failed.
RESTART_RETRY_S = 2
UNAVAILABLE_RETRY_S = 10
#: The same after a first token that came too late: some of what was in front of the request is done by then.
FIRST_TOKEN_RETRY_S = 5
#: Status that proxies log for a client that went away; nobody reads the response.
CLIENT_CLOSED = 499


class ServerError(Exception):
    """Base of what the server reports on purpose, before or while it serves."""


class BadRequest(ServerError):
    """A field that cannot be served as asked."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class BadJSON(ServerError):
    def __init__(self, reason: str) -> None:
        super().__init__(f"the request body is not valid JSON: {reason}")


class NotJSON(ServerError):
    def __init__(self, content_type: str) -> None:
        got = repr(content_type[:80]) if content_type else "none"
        super().__init__(f"send the header `Content-Type: application/json` (got {got})")


class BodyTooLarge(ServerError):
    def __init__(self, limit_bytes: int) -> None:
        megabytes = limit_bytes / 2**20
        super().__init__(
            f"the request body is larger than the {megabytes:g} MiB that this server reads: "
            f"send less, or raise `max_body_mb` under [server] in lq.toml"
        )


class UnknownModel(ServerError):
    def __init__(self, name: str, known: str) -> None:
        super().__init__(f"the model {name[:200]!r} does not exist here; {known}")


#: What models of each kind do, and where.
DOES = {"text": "writes text", "embedding": "embeds texts", "rerank": "ranks documents"}
ROUTES = {
    "text": "/v1/chat/completions or /v1/completions",
    "embedding": "/v1/embeddings",
    "rerank": "/v1/rerank",
}


class WrongKind(ServerError):
    """A model that does something else than was asked for."""

    def __init__(self, name: str, kind: str, instead: str = "") -> None:
        use = f"use it with {ROUTES[kind]}{f'; {instead}' if instead else ''}"
        super().__init__(f"the model {name[:200]!r} {DOES[kind]}: {use}")


class Unauthorized(ServerError):
    def __init__(self, *, given: bool) -> None:
        problem = "the API key is wrong" if given else "no API key was given"
        super().__init__(f"{problem}: send the header `Authorization: Bearer KEY`")


class HostNotAllowed(ServerError):
    def __init__(self, host: str) -> None:
        super().__init__(
            f"the Host header {host[:200]!r} is not a name of this server: "
            f"use 127.0.0.1 or localhost, or list it in `allowed_hosts` under [server] in lq.toml"
        )


class PromptTooLong(ContextOverflow):
    """The same, with the field of the request that the prompt came from."""

    def __init__(self, overflow: ContextOverflow, param: str) -> None:
        super().__init__(overflow.n_prompt_tokens, overflow.n_ctx, at_least=overflow.at_least)
        self.param = param


class Refused(ServerError):
    """A limit that the operator set for a key; None: to come back later is of no use."""

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TooManyRequests(Refused):
    def __init__(self, key: str, limit: int, retry_after_s: float) -> None:
        problem = f"{_owner(key)} may have {limit} requests open at once, and has"
        super().__init__(f"{problem}: send the next when one has ended", retry_after_s)


class TokensUsedUp(Refused):
    def __init__(self, key: str, limit: int, wanted: int, wait_s: float) -> None:
        wait = math.ceil(wait_s)
        problem = f"{_owner(key)} may use {limit} tokens a minute, prompts and answers together"
        super().__init__(f"{problem}: {wanted} for this request are there in {wait} s", wait)


class RequestOverRate(Refused):
    def __init__(self, key: str, limit: int, n_prompt: int) -> None:
        problem = (
            f"the prompt has {n_prompt} tokens, and {_owner(key)} may use {limit} a minute, with the answer"
        )
        super().__init__(
            f"{problem}: shorten the prompt, or have `tokens_per_minute` raised in lq.toml", None
        )


class FirstTokenLate(Refused):
    def __init__(self, limit_s: float) -> None:
        problem = f"no token within {limit_s:g} s (`ttft_s`): the server has too much to do"
        super().__init__(f"{problem}; the request was cancelled, try again later", FIRST_TOKEN_RETRY_S)


class RequestTooLong(Refused):
    def __init__(self, limit_s: float) -> None:
        problem = f"the request took longer than {limit_s:g} s (`total_s`) and was cancelled"
        super().__init__(f"{problem}: ask for less, such as with a smaller `max_tokens` or fewer texts", None)


def _owner(key: str) -> str:
    return f"the key {key!r}" if key else "everybody together"


class EmbedderBusy(ServerError):
    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} embedding jobs are waiting already: try again in a second")


class CollectionUnavailable(ServerError):
    """A collection that is there and cannot be searched, until the operator does what `reason` says."""

    def __init__(self, name: str, reason: Exception) -> None:
        super().__init__(f"the collection {name[:200]!r} cannot be searched now: {reason}")


class ModelTooLarge(ServerError):
    """A model whose weights and context are more than all models together may take."""

    def __init__(self, name: str, needed: Bytes, budget: Bytes) -> None:
        if needed.host > budget.host:
            sizes, memory, also = (needed.host, budget.host), "memory", ""
            option = "memory_budget_mb"
        else:
            sizes, memory, also = (needed.device, budget.device), "GPU memory", "gpu_layers, "
            option = "gpu_memory_budget_mb"
        super().__init__(
            f"the model {name!r} needs {gigabytes(sizes[0])} of {memory} and all models together may take "
            f"{gigabytes(sizes[1])}: lower its {also}n_ctx, n_parallel or kv_cells, take a smaller file, or "
            f"raise {option} under [server] in lq.toml"
        )


class ModelNotLoaded(ServerError):
    """A model whose engine did not start; the next request tries once more."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"the model {name!r} cannot be loaded: {reason}")


class ClientGone(ServerError):
    """The client closed the connection; its work was cancelled."""

    def __init__(self) -> None:
        super().__init__("the client closed the connection")


def gigabytes(size_bytes: int) -> str:
    """For people: 1.2 GB."""
    return f"{size_bytes / 1e9:.1f} GB"


@dataclass(frozen=True, slots=True)
class Failure:
    """What the client is told."""

    status: int
    type: str
    code: str
    message: str
    param: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    retry_after_s: float | None = None

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error | dict(self.extra)}

    def headers(self) -> dict[str, str]:
        """`x-should-retry` is OpenAI's way to tell its clients; `retry-after` is in whole seconds."""
        headers = {"x-should-retry": "false" if self.retry_after_s is None else "true"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        return headers


#: Names that the engine gives to fields, where the API has another.
ENGINE_FIELDS = {"grammar": "response_format", "top_logprobs": "logprobs"}


@dataclass(frozen=True, slots=True)
class Row:
    """How one exception and those derived from it are told."""

    status: int
    code: str
    param: str | None = None
    retry_after_s: float | None = None


TABLE: dict[type[BaseException], Row] = {
    ContextOverflow: Row(400, "context_length_exceeded", "messages"),
    InvalidRequest: Row(400, "invalid_value"),
    BadRequest: Row(400, "invalid_value"),
    PromptError: Row(400, "invalid_prompt", "prompt"),
    InvalidName: Row(400, "invalid_collection", "collection"),
    BadJSON: Row(400, "invalid_json"),
    Unauthorized: Row(401, "invalid_api_key"),
    HostNotAllowed: Row(403, "host_not_allowed"),
    WrongKind: Row(400, "wrong_model_kind", "model"),
    UnknownModel: Row(404, "model_not_found", "model"),
    UnknownCollection: Row(404, "collection_not_found", "collection"),
    BodyTooLarge: Row(413, "request_too_large"),
    NotJSON: Row(415, "unsupported_media_type"),
    QueueFull: Row(429, "queue_full", retry_after_s=1),
    EmbedderBusy: Row(429, "queue_full", retry_after_s=1),
    TooManyRequests: Row(429, "too_many_requests"),
    TokensUsedUp: Row(429, "rate_limit_exceeded"),
    RequestOverRate: Row(429, "request_over_rate_limit"),
    ClientGone: Row(CLIENT_CLOSED, "client_closed_request"),
    EngineRestarted: Row(503, "engine_restarted", retry_after_s=RESTART_RETRY_S),
    EngineUnavailable: Row(503, "engine_unavailable", retry_after_s=UNAVAILABLE_RETRY_S),
    CollectionUnavailable: Row(503, "collection_unavailable", "collection"),
    ModelTooLarge: Row(503, "model_too_large", "model"),
    ModelNotLoaded: Row(503, "model_not_loaded", "model"),
    FirstTokenLate: Row(503, "first_token_timeout"),
    RequestTooLong: Row(504, "request_timeout"),
    EngineError: Row(500, "server_error"),
    ModelsError: Row(500, "server_error"),
    RagError: Row(500, "server_error"),
    ServerError: Row(500, "server_error"),
}
UNFORESEEN = "an error inside the server; its log has the place under this request's x-request-id"


def describe(error: BaseException) -> Failure:
    """The failure of any exception; what is not foreseen is a 500 that tells nothing of the inside."""
    row = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), None)
    if row is None:
        return Failure(500, "server_error", "internal_error", UNFORESEEN)
    code, param, retry_after_s = row.code, row.param, row.retry_after_s
    extra: dict[str, Any] = {}
    if isinstance(error, ContextOverflow):
        extra = {"n_prompt_tokens": error.n_prompt_tokens, "n_ctx": error.n_ctx}
        param = error.param if isinstance(error, PromptTooLong) else param
    elif isinstance(error, InvalidRequest):
        param = ENGINE_FIELDS.get(error.field, error.field)
    elif isinstance(error, BadRequest):
        code, param = error.code, error.param
    elif isinstance(error, QueueFull | Refused):
        retry_after_s = error.retry_after_s
    message = error.told() if isinstance(error, PromptError) else str(error)
    return Failure(row.status, _type(row.status), code, message, param, extra, retry_after_s)


def logged(error: BaseException, *, request_id: str) -> Failure:
    """The failure of an exception; the place of one that is not foreseen goes to the log."""
    failure = describe(error)
    if failure.code == "internal_error":
        # The place, not the message: an exception may quote what a user wrote.
        place = "".join(traceback.format_tb(error.__traceback__))
        LOG.error("%s %s\n%s", request_id, type(error).__name__, place)
    return failure


def of_status(status: int, detail: str) -> Failure:
    """The failure of a plain HTTP status, such as a route that does not exist."""
    names = {404: "route_not_found", 405: "method_not_allowed"}
    code = names.get(status) or HTTPStatus(status).phrase.lower().replace(" ", "_")
    return Failure(status, _type(status), code, detail)


def _type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "server_error" if status >= 500 else "invalid_request_error"
