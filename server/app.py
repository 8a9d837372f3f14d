"""The Litestar application of a service: routes, keys, errors in OpenAI's shape, the OpenAPI page."""

from litestar import Litestar, Request
from litestar.config.cors import CORSConfig
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.handlers import BaseRouteHandler
from litestar.openapi import OpenAPIConfig
from litestar.response import Response

from server.errors import Failure, of_status
from server.gate import Gate
from server.openapi_page import SPECIFICATION_PATH, DocumentPage, Specification
from server.routes.chat import chat_completions
from server.routes.completions import completions
from server.routes.embeddings import embeddings
from server.routes.engine import engines
from server.routes.health import health, metrics
from server.routes.models import list_models, show_model
from server.routes.rerank import rerank_documents
from server.service import Service

ROUTES = [
    chat_completions,
    completions,
    embeddings,
    rerank_documents,
    list_models,
    show_model,
    engines,
    health,
    metrics,
]


def create_app(service: Service) -> Gate:
    """The ASGI application; the service must stay open as long as it runs."""
    origins = service.settings.server.cors_origins
    app = Litestar(
        ROUTES,
        guards=[_require_key],
        exception_handlers={HTTPException: _of_litestar, Exception: _of_any},
        openapi_config=_openapi(),
        cors_config=CORSConfig(allow_origins=list(origins), allow_credentials=False) if origins else None,
        request_max_body_size=None,  # server.body counts, and drains what is too much
        logging_config=None,
    )
    app.state.service = service
    return Gate(app, service)


def _require_key(connection: ASGIConnection, handler: BaseRouteHandler) -> None:
    if handler.opt.get("open") or connection.scope["path"].startswith("/docs"):
        return
    service: Service = connection.app.state.service
    name = service.keys.check(connection.headers.get("authorization"))
    connection.scope["lq_key"] = name  # type: ignore[typeddict-unknown-key]


def _of_litestar(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        return _response(of_status(404, f"no route {request.method} {request.url.path}; see /docs"))
    return _response(of_status(error.status_code, error.detail))


def _of_any(request: Request, error: Exception) -> Response:
    service: Service = request.app.state.service
    return _response(service.failed(error, request.scope))


def _response(failure: Failure) -> Response:
    return Response(
        failure.body(),
        status_code=failure.status,
        headers=failure.headers(),
        media_type="application/json",
    )


def _openapi() -> OpenAPIConfig:
    return OpenAPIConfig(
        title="lq",
        version="1",
        description="OpenAI's API for local models, assistants and documents.",
        path="/docs",
        use_handler_docstrings=True,
        render_plugins=[DocumentPage(path="/"), Specification(path=SPECIFICATION_PATH)],
    )
