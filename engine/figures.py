"""What a loop counts, and the snapshot that it gives of itself."""

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Protocol

from engine.request import EngineStats
from engine.scheduler import Scheduler

_STALLS_KEPT = 2048  # of the latest calls that let a stream wait


class _Sized(Protocol):
    n_ctx: int


class _Guessing(Protocol):
    @property
    def n_tried(self) -> int: ...

    @property
    def n_right(self) -> int: ...


@dataclass(slots=True)
class Counters:
    """Since the loop was made."""

    requests_total: int = 0
    cancelled_total: int = 0
    failed_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    completion_tokens_total: int = 0
    decode_steps_total: int = 0
    busy_s: float = 0.0


@dataclass(slots=True)
class Figures:
    """Counters, and how long streams waited between two tokens of theirs."""

    counters: Counters = field(default_factory=Counters)
    stalls_s: deque[float] = field(default_factory=lambda: deque(maxlen=_STALLS_KEPT))

    def waited(self, seconds: float) -> None:
        """A running stream got a token so long after the one before."""
        self.stalls_s.append(seconds)

    def stall_ms(self, share: float) -> float:
        """That share of the latest waits was shorter; 0 before there were any."""
        if not self.stalls_s:
            return 0.0
        ordered = sorted(self.stalls_s)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def snapshot(self, scheduler: Scheduler, context: _Sized, guessing: _Guessing) -> EngineStats:
        """All figures as they are now."""
        held, stash = scheduler.held, scheduler.held.stash
        running = scheduler.running
        in_slots = sum(len(slot.tokens) for slot in held.slots)
        used = sum(each.n_computed for each in running)
        total = in_slots if held.cells is None else held.cells.n_used
        return EngineStats(
            running=len(running),
            waiting=len(scheduler.queue),
            n_slots=len(held.slots),
            kv_cells_total=context.n_ctx,
            kv_cells_used=used if held.cells is None else min(used, total),
            kv_cells_cached=max(0, total - used),
            kv_cells_shared=0 if held.cells is None else held.cells.n_shared,
            cache_ram_bytes=stash.used["ram"],
            cache_disk_bytes=stash.used["disk"],
            cache_states=len(stash.states),
            preempted_total=scheduler.n_preempted,
            guessed_tokens_total=guessing.n_tried,
            right_guesses_total=guessing.n_right,
            stall_p50_ms=self.stall_ms(0.5),
            stall_p99_ms=self.stall_ms(0.99),
            stall_max_ms=self.stall_ms(1.0),
            **{item.name: getattr(self.counters, item.name) for item in fields(Counters)},
        )
