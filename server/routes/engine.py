"""GET /v1/engine."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from litestar import Request, get
from litestar.response.base import ASGIResponse

from engine.request import EngineConfig, EngineInfo
from engine.stats import EngineStats, SlotStats
from server.roster import Roster
from server.routes.completing import json_response
from server.schema.engine import (
    EngineList,
    EngineState,
    Features,
    HitRates,
    LoadedAdapter,
    Memory,
    Slot,
)
from server.service import Service
from server.snapshots import Told


@get("/v1/engine", tags=["server"])
async def engines(request: Request) -> ASGIResponse:
    """Every engine: what it was given of the machine, whether it is loaded, what it does now."""
    service: Service = request.app.state.service
    fleet = service.roster.fleet
    listed = EngineList(
        data=[describe(each, service.roster) for each in await service.engines()],
        memory_budget_bytes=fleet.budget.host,
        memory_held_bytes=fleet.held.host,
        gpu_memory_budget_bytes=fleet.budget.device,
        gpu_memory_held_bytes=fleet.held.device,
    )
    return json_response(listed)


def describe(told: Told, roster: Roster) -> EngineState:
    """One engine."""
    standing = told.standing
    plan = roster.plans[standing.member.name]
    config, memory = plan.config, plan.footprint
    stats = told.snapshot.stats if told.snapshot else None
    info = standing.engine.info if standing.engine else None
    return EngineState(
        id=plan.name,
        models=list(told.names),
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
        features=features(info, stats) if info else None,
        adapters=adapters(told, roster, stats),
        stats_age_s=told.snapshot.age_s if told.snapshot else None,
        slots=[slot(each) for each in stats.slots] if stats else None,
        queue={str(priority): n for priority, n in stats.waiting_by_priority} if stats else None,
        hit_rates=hit_rates(stats) if stats else None,
        stats=figures(stats) if stats else None,
    )


def features(info: EngineInfo, stats: EngineStats | None) -> Features:
    """What an engine can do, and what it does now."""
    return Features(
        unified=info.unified,
        prefix_sharing=info.shares_prefixes,
        guesses=info.guesses,
        guessing=stats.guessing if stats else None,
        acceptance=_share(stats.right_guesses_total, stats.guessed_tokens_total) if stats else None,
        flash_attention=info.flash_attention,
        kernels=list(info.kernels),
        gpu=info.gpu,
    )


def adapters(told: Told, roster: Roster, stats: EngineStats | None) -> list[LoadedAdapter]:
    """Those beside the model, and how many requests run with each."""
    running = Counter(name for each in (stats.slots if stats else ()) for name, _ in each.adapters)
    scales = {name: roster.adapter_scales(name) for name in told.names}
    return [
        LoadedAdapter(
            name=adapter,
            default_scales={name: of[adapter] for name, of in scales.items() if adapter in of},
            running=running[adapter] if stats else None,
        )
        for adapter, _ in told.standing.member.config.adapters
    ]


def slot(stats: SlotStats) -> Slot:
    """One slot as it is told."""
    return Slot(
        state=stats.state,
        n_tokens=stats.n_tokens,
        n_cached_tokens=stats.n_cached_tokens,
        adapters=dict(stats.adapters),
        age_s=stats.age_s,
    )


def hit_rates(stats: EngineStats) -> HitRates:
    """How much of what was asked was in the cache, and where."""
    n_tokens = stats.prompt_tokens_total
    return HitRates(
        all=_share(stats.cached_tokens_total, n_tokens),
        slot=_share(stats.cached_slot_tokens_total, n_tokens),
        ram=_share(stats.cached_ram_tokens_total, n_tokens),
        disk=_share(stats.cached_disk_tokens_total, n_tokens),
    )


def figures(stats: EngineStats) -> dict[str, Any]:
    """All that is a number, but for the histogram of stalls, which is Prometheus'."""
    apart = {"slots", "waiting_by_priority", "guessing", "stall_counts"}
    return {name: value for name, value in asdict(stats).items() if name not in apart}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _named(value: Any) -> Any:
    """Paths as file names: where files lie on the server is not the clients' business."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, dict):
        return {key: _named(each) for key, each in value.items()}
    return [_named(each) for each in value] if isinstance(value, list | tuple) else value


def _without_folder(problem: str | None, config: EngineConfig) -> str | None:
    return problem and problem.replace(f"{config.model_path.parent}/", "")
