"""The engines' own figures for Prometheus, each engine once, under the name of its first model.

They are made anew for everybody who asks: one that is not loaded has none but that it is not up.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from engine.stats import STALL_BOUNDS_S, EngineStats
from models.placement import Bytes
from server.fleet import Standing
from server.snapshots import Told

#: Fields of EngineStats: what they are called here behind "lq_engine_", and what they mean.
GAUGES = {
    "running": "Sequences being decoded.",
    "waiting": "Requests in the queue.",
    "n_slots": "Sequences that can be decoded together.",
    "kv_cells_total": "Cells of the KV cache.",
    "kv_cells_used": "Cells held by running sequences.",
    "kv_cells_cached": "Cells held by idle slots alone, for their prefix.",
    "kv_cells_free": "Cells held by nobody.",
    "kv_cells_shared": "Cells held by more than one slot (unified memory).",
    "cache_states": "Prefixes kept outside of the KV cache.",
    "cache_ram_bytes": "Host memory that they take.",
    "cache_disk_bytes": "Disk that they take.",
    "stall_p50_ms": "Milliseconds between two tokens of a stream, median of the latest 2,048.",
    "stall_p99_ms": "99 % of them are shorter.",
    "stall_max_ms": "The longest of them.",
}
#: The same of counters, whose names here end in "_total".
COUNTERS = {
    "preempted_total": ("preempted", "Times that a sequence made way for another."),
    "guessed_tokens_total": ("guessed_tokens", "Tokens guessed ahead."),
    "right_guesses_total": ("right_guesses", "Guesses that were right."),
    "requests_total": ("requests", "Requests taken."),
    "cancelled_total": ("cancelled", "Requests cancelled, by a client that left above all."),
    "failed_total": ("failed", "Requests failed."),
    "prompt_tokens_total": ("prompt_tokens", "Prompt tokens of requests that were let in."),
    "cached_tokens_total": ("cached_tokens", "Prompt tokens that were in the cache."),
    "completion_tokens_total": ("completion_tokens", "Tokens written."),
    "decode_steps_total": ("decode_steps", "Calls of llama_decode."),
    "busy_s": ("busy_seconds", "Seconds spent in steps."),
    "restarts_total": ("restarts", "Times that the process was started again."),
}
TIERS = {
    "slot": "cached_slot_tokens_total",
    "ram": "cached_ram_tokens_total",
    "disk": "cached_disk_tokens_total",
}


class EngineFigures(Collector):
    """`told`, `budget` and `held` are what the next exposition says."""

    def __init__(self) -> None:
        self.told: Sequence[Told] = ()
        self.budget = self.held = Bytes(0)

    def collect(self) -> Iterator[Metric]:
        """What Prometheus is told."""
        budget, held = "What all engines together may take", "Estimated, of engines that run, load or end"
        for called, text, value in (
            ("memory_budget", f"{budget}, of the host's memory.", self.budget.host),
            ("memory_held", f"{held}, of the host's memory.", self.held.host),
            ("gpu_memory_budget", f"{budget}, of the GPU's memory.", self.budget.device),
            ("gpu_memory_held", f"{held}, of the GPU's memory.", self.held.device),
        ):
            yield GaugeMetricFamily(f"lq_{called}_bytes", text, value=value)
        yield from self._of_all()
        told = [(each.standing.member.name, each.snapshot) for each in self.told]
        snapshots = [(name, snapshot) for name, snapshot in told if snapshot is not None]
        ages = ((name, snapshot.age_s) for name, snapshot in snapshots)
        yield _gauge("stats_age_seconds", "How old the figures of this engine are.", ages)
        yield from _figures([(name, snapshot.stats) for name, snapshot in snapshots])

    def _of_all(self) -> Iterator[Metric]:
        """Of engines that are not loaded, too."""
        rows: dict[str, tuple[str, Callable[[Standing], float]]] = {
            "up": ("1 when the engine's process runs.", lambda each: each.state == "ready"),
            "leases": ("Requests that hold the engine.", lambda each: each.users),
            "load_waiting": ("Requests that wait for the engine to be loaded.", lambda each: each.waiting),
            "memory_bytes": ("Of the host, estimated, once loaded.", lambda each: each.member.size.host),
            "gpu_memory_bytes": ("Of the GPU, estimated, once loaded.", lambda each: each.member.size.device),
        }
        standings = [each.standing for each in self.told]
        for called, (text, value) in rows.items():
            yield _gauge(called, text, ((each.member.name, value(each)) for each in standings))
        names = GaugeMetricFamily(
            "lq_engine_names", "1 for each model and assistant (name) that the engine answers for.",
            labels=["model", "name"],
        )  # fmt: skip
        for engine in self.told:
            for name in engine.names:
                names.add_metric([engine.standing.member.name, name], 1)
        yield names


def _figures(told: list[tuple[str, EngineStats]]) -> Iterator[Metric]:
    """Of engines that run."""
    for field, text in GAUGES.items():
        yield _gauge(field, text, ((name, getattr(stats, field)) for name, stats in told))
    for field, (called, text) in COUNTERS.items():
        counter = CounterMetricFamily(f"lq_engine_{called}", text, labels=["model"])
        for name, stats in told:
            counter.add_metric([name], getattr(stats, field))
        yield counter
    yield _hits(told)
    yield _stalls(told)
    yield _queues(told)


def _gauge(called: str, text: str, values: Iterable[tuple[str, float]]) -> Metric:
    gauge = GaugeMetricFamily(f"lq_engine_{called}", text, labels=["model"])
    for name, value in values:
        gauge.add_metric([name], value)
    return gauge


def _hits(told: list[tuple[str, EngineStats]]) -> Metric:
    hits = CounterMetricFamily(
        "lq_engine_cache_hit_tokens", "Prompt tokens that were in the cache, by tier: slot, ram, disk.",
        labels=["model", "tier"],
    )  # fmt: skip
    for name, stats in told:
        for tier, field in TIERS.items():
            hits.add_metric([name, tier], getattr(stats, field))
    return hits


def _stalls(told: list[tuple[str, EngineStats]]) -> Metric:
    stalls = HistogramMetricFamily(
        "lq_engine_stall_seconds", "Between two tokens of a stream.", labels=["model"]
    )
    bounds = [*map(str, STALL_BOUNDS_S), "+Inf"]
    for name, stats in told:
        buckets = list(zip(bounds, accumulate(stats.stall_counts), strict=True))
        stalls.add_metric([name], buckets, stats.stall_s_total)
    return stalls


def _queues(told: list[tuple[str, EngineStats]]) -> Metric:
    queue = GaugeMetricFamily(
        "lq_engine_queue", "Requests in the queue, by priority of their key.", labels=["model", "priority"]
    )
    for name, stats in told:
        for priority, count in stats.waiting_by_priority:
            queue.add_metric([name, str(priority)], count)
    return queue
