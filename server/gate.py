"""Around every request: its id, the Host header, a log line and the figures of Prometheus.

Outermost, so that answers to routes that do not exist are covered too. Never logs what was asked or answered.
"""

import logging
import re
import secrets
import time
from typing import Any

import msgspec
from litestar.types import ASGIApp, Receive, Scope, Send

from server.errors import CLIENT_CLOSED, HostNotAllowed, describe
from server.service import Service
from server.ticket import Ticket

LOG = logging.getLogger("lq.server")
SANE_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


class Gate:
    """The ASGI application that holds the Litestar one."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app = app
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        started = time.perf_counter()
        status = CLIENT_CLOSED

        async def send_with_id(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {"x-request-id": request_id} | _rate(scope)
                added = [(name.encode("ascii"), value.encode("ascii")) for name, value in own.items()]
                headers = [*message.get("headers", ()), *added]
                message = {**message, "headers": headers}
            await send(message)

        scope["lq_request_id"] = request_id  # type: ignore[typeddict-unknown-key]
        metrics = self.service.metrics
        metrics.open_requests.inc()
        try:
            self.service.hosts.check(_header(scope, b"host"))
            await self.app(scope, receive, send_with_id)
        except HostNotAllowed as error:
            await refuse(error, send_with_id)
        finally:
            if ticket := scope.get("lq_ticket"):
                ticket.close()
            seconds = time.perf_counter() - started
            route = str(scope.get("path_template") or "unknown")
            metrics.open_requests.dec()
            metrics.requests.labels(_method(scope), route, str(status)).inc()
            metrics.duration.labels(route).observe(seconds)
            key = scope.get("lq_key") or "-"
            LOG.info("%s %s %s %d %.3fs key=%s", request_id, _method(scope), route, status, seconds, key)


async def refuse(error: Exception, send: Any) -> None:
    """Send an error without Litestar."""
    failure = describe(error)
    headers = [(b"content-type", b"application/json")]
    headers += [(name.encode(), value.encode()) for name, value in failure.headers().items()]
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send(
        {"type": "http.response.body", "body": msgspec.json.encode(failure.body()), "more_body": False}
    )


def _rate(scope: Scope) -> dict[str, str]:
    """What OpenAI's clients read about the tokens that their key may still use."""
    ticket: Ticket | None = scope.get("lq_ticket")
    return ticket.headers() if ticket else {}


def _request_id(scope: Scope) -> str:
    given = _header(scope, b"x-request-id") or ""
    return given if SANE_ID.match(given) else f"req_{secrets.token_hex(12)}"


def _header(scope: Scope, name: bytes) -> str | None:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name), None)


def _method(scope: Scope) -> str:
    method = str(scope.get("method"))
    return method if method in {"GET", "POST", "HEAD", "OPTIONS"} else "other"
