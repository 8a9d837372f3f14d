"""GET /health for supervisors, GET /metrics for Prometheus."""

from litestar import Request, get
from litestar.response.base import ASGIResponse

from server.routes.completing import json_response
from server.service import Service


@get("/health", tags=["server"], opt={"open": True})
async def health(request: Request) -> ASGIResponse:
    """200 unless an engine's process died and is being started again (503). Needs no key.

    An engine that is not loaded is started by the first request that needs it: nothing is wrong with that.
    """
    service: Service = request.app.state.service
    roster = service.roster
    lost = [each for each in roster.standings().values() if each.state == "down"]
    down = [name for standing in lost for name in roster.names(standing)]
    if down:
        return json_response({"status": "starting", "engines_down": down}, status=503)
    return json_response({"status": "ok"})


@get("/metrics", tags=["server"])
async def metrics(request: Request) -> ASGIResponse:
    """Requests, tokens, times and the engines' own figures."""
    service: Service = request.app.state.service
    return ASGIResponse(
        body=await service.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
    )
