"""GET /health for supervisors, GET /metrics for Prometheus."""

from litestar import Request, get
from litestar.response.base import ASGIResponse

from server.routes.completing import json_response
from server.service import Service


@get("/health", tags=["server"], opt={"open": True})
async def health(request: Request) -> ASGIResponse:
    """200 when every engine's process is alive, 503 while one is being started again. Needs no key."""
    service: Service = request.app.state.service
    down = [name for name, engine in service.roster.engines.items() if not engine.alive]
    if down:
        return json_response({"status": "starting", "engines_down": down}, status=503)
    return json_response({"status": "ok"})


@get("/metrics", tags=["server"])
async def metrics(request: Request) -> ASGIResponse:
    """Requests, tokens, times and the engines' own figures."""
    service: Service = request.app.state.service
    service.metrics.embedding_jobs.set(service.embedders.waiting)
    body = service.metrics.text(await service.stats())
    return ASGIResponse(body=body, media_type="text/plain; version=0.0.4; charset=utf-8")
