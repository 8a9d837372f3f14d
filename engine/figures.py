"""What a loop counts, and the snapshot that it gives of itself."""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple, Protocol

from engine.holdings import Holdings
from engine.scheduler import Scheduler
from engine.sequence import Sequence, Slot
from engine.stats import N_STALL_BUCKETS, STALL_BOUNDS_S, EngineStats, SlotStats

_STALLS_KEPT = 2048  # of the latest calls that let a stream wait


class _Sized(Protocol):
    n_ctx: int


class _Guessing(Protocol):
    @property
    def n_tried(self) -> int: ...

    @property
    def n_right(self) -> int: ...


class KVCells(NamedTuple):
    """Cells of a KV memory; `used`, `cached` and `free` are all of them."""

    used: int  # held by running sequences
    cached: int  # held by idle slots alone
    free: int  # held by nobody
    shared: int  # held by more than one slot

    @classmethod
    def of(cls, held: Holdings, n_total: int) -> "KVCells":
        """Those that the slots hold, each counted once; in streams no two slots hold the same."""
        idle = [index for index, slot in enumerate(held.slots) if slot.sequence is None]
        if held.cells is not None:
            n_held, cached, shared = held.cells.n_used, held.cells.n_alone(idle), held.cells.n_shared
        else:
            n_held = sum(len(slot.tokens) for slot in held.slots)
            cached, shared = sum(len(held.slots[index].tokens) for index in idle), 0
        return cls(n_held - cached, cached, n_total - n_held, shared)


@dataclass(slots=True)
class Counters:
    """Since the loop was made."""

    requests_total: int = 0
    cancelled_total: int = 0
    failed_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    cached_slot_tokens_total: int = 0
    cached_ram_tokens_total: int = 0
    cached_disk_tokens_total: int = 0
    completion_tokens_total: int = 0
    decode_steps_total: int = 0
    busy_s: float = 0.0
    stall_s_total: float = 0.0

    def ended(self, sequence: Sequence) -> None:
        """Count what a request read and wrote; the prompt of one that was never let in is no miss."""
        if sequence.n_cached is None:
            return
        self.prompt_tokens_total += len(sequence.prompt)
        self.completion_tokens_total += sequence.n_written
        self.cached_tokens_total += sequence.n_cached
        match sequence.cached_tier:
            case "slot":
                self.cached_slot_tokens_total += sequence.n_cached
            case "ram":
                self.cached_ram_tokens_total += sequence.n_cached
            case "disk":
                self.cached_disk_tokens_total += sequence.n_cached


@dataclass(slots=True)
class Figures:
    """Counters, and how long streams waited between two tokens of theirs."""

    counters: Counters = field(default_factory=Counters)
    stalls_s: deque[float] = field(default_factory=lambda: deque(maxlen=_STALLS_KEPT))
    stall_counts: list[int] = field(default_factory=lambda: [0] * N_STALL_BUCKETS)
    guessing: bool = False

    def waited(self, seconds: float) -> None:
        """A running stream got a token so long after the one before."""
        self.stalls_s.append(seconds)
        self.stall_counts[bisect_left(STALL_BOUNDS_S, seconds)] += 1
        self.counters.stall_s_total += seconds

    def stall_ms(self, *shares: float) -> list[float]:
        """Those shares of the latest waits were shorter; 0 before there were any."""
        ordered = sorted(self.stalls_s) or [0.0]
        return [1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in shares]

    def snapshot(
        self, scheduler: Scheduler, context: _Sized, tried: _Guessing, ages_s: Mapping[Hashable, float]
    ) -> EngineStats:
        """All figures as they are now; `ages_s`: of running requests, by their sequence's id."""
        held, stash = scheduler.held, scheduler.held.stash
        cells = KVCells.of(held, context.n_ctx)
        p50, p99, longest = self.stall_ms(0.5, 0.99, 1.0)
        waiting = Counter(each.tenant.priority for each in scheduler.queue)
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.queue),
            waiting_by_priority=tuple(sorted(waiting.items(), reverse=True)),
            n_slots=len(held.slots),
            slots=tuple(slot_stats(slot, ages_s) for slot in held.slots),
            kv_cells_total=context.n_ctx,
            kv_cells_used=cells.used,
            kv_cells_cached=cells.cached,
            kv_cells_free=cells.free,
            kv_cells_shared=cells.shared,
            cache_ram_bytes=stash.used["ram"],
            cache_disk_bytes=stash.used["disk"],
            cache_states=len(stash.states),
            preempted_total=scheduler.n_preempted,
            guessed_tokens_total=tried.n_tried,
            right_guesses_total=tried.n_right,
            guessing=self.guessing,
            stall_p50_ms=p50,
            stall_p99_ms=p99,
            stall_max_ms=longest,
            stall_counts=tuple(self.stall_counts),
            **{item.name: getattr(self.counters, item.name) for item in fields(Counters)},
        )


def slot_stats(slot: Slot, ages_s: Mapping[Hashable, float]) -> SlotStats:
    """What a slot does, and nothing of what is in it."""
    sequence = slot.sequence
    if sequence is None:
        return SlotStats("idle", len(slot.tokens))
    assert isinstance(sequence.adapters, tuple)
    state = "following" if sequence.leader else "writing" if sequence.is_writing else "prompt"
    return SlotStats(
        state,
        len(slot.tokens),
        n_cached_tokens=sequence.n_cached or 0,
        adapters=sequence.adapters,
        age_s=ages_s.get(sequence.id),
    )
