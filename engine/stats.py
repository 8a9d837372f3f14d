"""What an engine tells of itself at one moment: figures, and what each slot does. Never what is in a slot.

Plain values that cross the process boundary; figures.py takes them.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

SlotState = Literal["idle", "prompt", "writing", "following"]

#: Upper bounds of the classes that waits between two tokens of a stream are counted in; the last has none.
STALL_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
N_STALL_BUCKETS = len(STALL_BOUNDS_S) + 1


@dataclass(frozen=True, slots=True)
class SlotStats:
    """One slot, and the request in it."""

    state: SlotState  # following: another request computes the part of the prompt that both begin with
    n_tokens: int  # that it holds computed
    n_cached_tokens: int = 0  # of its request's prompt, found in the cache
    adapters: tuple[tuple[str, float], ...] = ()  # of its request: names and scales
    age_s: float | None = None  # since its request was first let in; None: idle


@dataclass(frozen=True, slots=True)
class EngineStats:
    """A snapshot. Counters run since the engine handle was started, restarts included."""

    running: int
    waiting: int
    n_slots: int
    kv_cells_total: int
    kv_cells_used: int  # held by running sequences
    kv_cells_cached: int  # held by idle slots alone, for their prefix; given up when needed
    requests_total: int = 0
    cancelled_total: int = 0
    failed_total: int = 0
    prompt_tokens_total: int = 0  # of requests that were let in
    cached_tokens_total: int = 0  # of prompt_tokens_total
    completion_tokens_total: int = 0
    decode_steps_total: int = 0  # llama_decode calls
    busy_s: float = 0.0  # time spent in steps
    kv_cells_free: int = 0  # held by nobody
    kv_cells_shared: int = 0  # held by more than one slot (unified memory)
    cache_ram_bytes: int = 0  # of states saved outside of the KV memory
    cache_disk_bytes: int = 0
    cache_states: int = 0
    preempted_total: int = 0  # times that a sequence made way for another
    guessed_tokens_total: int = 0
    right_guesses_total: int = 0
    stall_p50_ms: float = 0.0  # between two tokens of a stream, of the latest 2,048
    stall_p99_ms: float = 0.0
    stall_max_ms: float = 0.0
    restarts_total: int = 0
    cached_slot_tokens_total: int = 0  # of cached_tokens_total: those that a slot held
    cached_ram_tokens_total: int = 0  # those that came from host memory
    cached_disk_tokens_total: int = 0
    stall_s_total: float = 0.0  # all waits together
    stall_counts: tuple[int, ...] = (0,) * N_STALL_BUCKETS  # of all waits, by the first bound not below them
    guessing: bool = False  # the last call that could hold guesses did
    waiting_by_priority: tuple[tuple[int, int], ...] = ()  # (priority, requests), the highest first
    slots: tuple[SlotStats, ...] = field(default=())

    def after(self, past: "EngineStats | None") -> "EngineStats":
        """The same with counters that go on from where those of an earlier process ended."""
        if past is None:
            return self
        totals: dict[str, Any] = {name: getattr(self, name) + getattr(past, name) for name in COUNTERS}
        pairs = zip(self.stall_counts, past.stall_counts, strict=True)
        return replace(self, **totals, stall_counts=tuple(here + there for here, there in pairs))


#: Fields of EngineStats that only ever grow, but for `restarts_total`, which the engine's handle counts.
COUNTERS = (
    "requests_total",
    "cancelled_total",
    "failed_total",
    "prompt_tokens_total",
    "cached_tokens_total",
    "completion_tokens_total",
    "decode_steps_total",
    "busy_s",
    "preempted_total",
    "guessed_tokens_total",
    "right_guesses_total",
    "cached_slot_tokens_total",
    "cached_ram_tokens_total",
    "cached_disk_tokens_total",
    "stall_s_total",
)
