"""GET /v1/engine."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from litestar import Request, get
from litestar.response.base import ASGIResponse

from engine.request import EngineConfig, EngineStats
from server.engines import Plan
from server.fleet import Standing
from server.routes.completing import json_response
from server.schema.engine import EngineList, EngineState, Memory
from server.service import Service, figures


@get("/v1/engine", tags=["server"])
async def engines(request: Request) -> ASGIResponse:
    """Every engine: what it was given of the machine, whether it is loaded, what it does now."""
    service: Service = request.app.state.service
    roster = service.roster
    standings = roster.standings()
    stats = await asyncio.gather(*(figures(each.engine) for each in standings.values()))
    states = [
        describe(roster.plans[name], standing, roster.names(standing), each)
        for (name, standing), each in zip(standings.items(), stats, strict=True)
    ]
    fleet = roster.fleet
    listed = EngineList(
        data=states,
        memory_budget_bytes=fleet.budget.host,
        memory_held_bytes=fleet.held.host,
        gpu_memory_budget_bytes=fleet.budget.device,
        gpu_memory_held_bytes=fleet.held.device,
    )
    return json_response(listed)


def describe(plan: Plan, standing: Standing, names: list[str], stats: EngineStats | None) -> EngineState:
    """One engine; `stats` as they are, whatever fields they have."""
    config, memory = plan.config, plan.footprint
    info = standing.engine.info if standing.engine else None
    return EngineState(
        id=plan.name,
        models=names,
        state=standing.state,
        problem=_without_folder(standing.problem, config),
        n_ctx=config.n_ctx,
        n_ctx_train=plan.facts.n_ctx_train,
        n_parallel=config.n_parallel,
        kv_cells=0 if config.kind != "text" else config.kv_cells or config.n_ctx * config.n_parallel,
        n_threads=info.n_threads if info else config.n_threads,
        gpu=info.gpu if info else None,
        n_layers=info.n_layers if info else plan.n_layers,
        n_gpu_layers=info.n_gpu_layers if info else config.n_gpu_layers,
        kv_type_k=config.kv_type_k,
        kv_type_v=config.kv_type_v,
        kv_type_reason=plan.why_cells or None,
        slow_attention=info.slow_attention if info else None,
        memory=Memory(
            weights_bytes=memory.weights_bytes,
            kv_bytes=memory.kv_bytes,
            compute_bytes=memory.compute_bytes,
            cache_bytes=memory.cache_bytes,
            total_bytes=memory.total_bytes,
            gpu_bytes=memory.device_bytes,
        ),
        leases=standing.users,
        waiting=standing.waiting,
        idle_s=standing.idle_s,
        keep_alive_s=standing.member.keep_alive_s,
        preload=standing.member.preload,
        config=_named(asdict(config)),
        stats=None if stats is None else asdict(stats),
    )


def _named(value: Any) -> Any:
    """Paths as file names: where files lie on the server is not the clients' business."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, list | tuple) else value


def _without_folder(problem: str | None, config: EngineConfig) -> str | None:
    return problem and problem.replace(f"{config.model_path.parent}/", "")
