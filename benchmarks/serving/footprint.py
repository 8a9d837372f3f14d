"""Memory of a server while it is under load: a sample every few seconds, and what it may hold at most."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from benchmarks.serving.client import get

SAMPLE_S = 2.0  # a sample reads the page tables of every process: often enough, and no load of its own


@dataclass(frozen=True, slots=True)
class Sample:
    """One look. `held_bytes`: of the server's processes together; `cached_bytes`: of it prefixes that it
    keeps beside its KV cache, None where it does not tell."""

    at_s: float
    n_ended: int  # requests that had an answer by then
    held_bytes: int
    cached_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Footprint:
    """Samples in order. `budget_bytes`: weights, KV cache and caches beside it as the server states them
    (GET /v1/engine); None where it does not tell."""

    samples: tuple[Sample, ...]
    budget_bytes: int | None = None


class _Memory(msgspec.Struct):
    weights_bytes: int
    kv_bytes: int
    cache_bytes: int


class _Stats(msgspec.Struct):
    cache_ram_bytes: int = 0


class _Engine(msgspec.Struct):
    memory: _Memory
    stats: _Stats | None = None


class _Engines(msgspec.Struct):
    data: list[_Engine]


async def watched(
    port: int,
    held_bytes: Callable[[], int],
    key: str | None,
    *,
    origin: float,
    n_ended: Callable[[], int],
    over: Callable[[], bool],
) -> Footprint:
    """Samples until `over`, and one after it."""
    samples: list[Sample] = []
    budget = None
    last = False
    while not last:
        last = over()
        engines = await _engines(port, key)
        held = await asyncio.to_thread(held_bytes)
        cached = sum(each.stats.cache_ram_bytes for each in engines if each.stats) if engines else None
        samples.append(Sample(time.perf_counter() - origin, n_ended(), held, cached))
        budget = sum(_granted(each.memory) for each in engines) if engines else budget
        pause_until = time.perf_counter() + SAMPLE_S
        while not last and not over() and time.perf_counter() < pause_until:
            await asyncio.sleep(0.05)
    return Footprint(tuple(samples), budget)


async def _engines(port: int, key: str | None) -> list[_Engine]:
    """Those of GET /v1/engine; none from a server that has no such route."""
    body = await get(port, "/v1/engine", key=key)
    return msgspec.json.decode(body, type=_Engines).data if body else []


def _granted(memory: _Memory) -> int:
    return memory.weights_bytes + memory.kv_bytes + memory.cache_bytes
