"""All clients of one round at once, against one server, in this process's event loop.

Bounded in count (the scenario's clients, at most MAX_CLIENTS) and in time (`timeout_s` for each request).
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.alone import Solo
from benchmarks.serving.client import Outcome, ask, get
from benchmarks.serving.footprint import Footprint, watched
from benchmarks.serving.plan import Client, Message, Turn

MAX_CLIENTS = 64
POLL_S = 0.02
FREED_WITHIN_S = 10.0


@dataclass(frozen=True, slots=True)
class Target:
    """A server under load. `running_metric`: the name of its gauge of sequences being decoded; `keys`: API
    keys by group of clients, none where nobody needs one; `held_bytes` tells what memory it holds now."""

    port: int
    model: str
    running_metric: str
    timeout_s: float
    keys: Mapping[str, str] = field(default_factory=dict)
    held_bytes: Callable[[], int] | None = None

    def key(self, group: str) -> str | None:
        """The key of a group, of any that has one where this has none: the warm-up belongs to nobody."""
        return self.keys.get(group) or next(iter(self.keys.values()), None)


@dataclass(frozen=True, slots=True)
class Round:
    """What one round gave. `freed_s`: from the last planned departure until the server had let go of all who
    left; None when nobody was to leave, or when it had not within ten seconds. `load_cpu_s`: processor time
    of the load generator itself, which it took from the server. `without`: the round of the same clients but
    for one group, played right after; `alone`: the same requests, each asked while nobody else asked;
    `again`: some of them asked so once more."""

    outcomes: list[Outcome]
    freed_s: float | None = None
    load_cpu_s: float = 0.0
    without: "Round | None" = None
    alone: tuple[Solo, ...] = ()
    again: tuple[Solo, ...] = ()
    footprint: Footprint | None = None


@dataclass(slots=True)
class _Group:
    """How far the clients of one group are."""

    size: int
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    n_begun: int = 0
    n_ended: int = 0

    def begin(self) -> None:
        """One more client has text, or ended without."""
        self.n_begun += 1
        if self.n_begun >= self.size:
            self.begun.set()

    def end(self) -> None:
        """One more client is through."""
        self.n_ended += 1
        if self.n_ended >= self.size:
            self.ended.set()


class _Load:
    """One round in progress."""

    def __init__(self, target: Target, clients: Sequence[Client]) -> None:
        self.target = target
        self.outcomes: list[Outcome] = []
        names = [client.group for client in clients]
        self.groups = {name: _Group(names.count(name)) for name in names}
        self.origin = time.perf_counter()

    async def live(self, number: int, client: Client) -> None:
        """The life of one client."""
        group = self.groups[client.group]
        if client.after:
            await self.groups[client.after].begun.wait()
        await asyncio.sleep(client.start_s)
        first = asyncio.Event()
        watcher = asyncio.create_task(self._watch_first(first, group))
        try:
            await self._turns(number, client, first)
        finally:
            first.set()  # a client that got nothing must not keep others waiting for ever
            await watcher
            group.end()

    async def _watch_first(self, first: asyncio.Event, group: _Group) -> None:
        await first.wait()
        group.begin()

    async def _turns(self, number: int, client: Client, first: asyncio.Event) -> None:
        history: list[Message] = []
        until = self.groups[client.until].ended if client.until else None
        broken = False
        for index, turn in enumerate(client.turns):
            if until and until.is_set():
                break
            outcome = Outcome(client.group, number, index)
            self.outcomes.append(outcome)
            if broken:
                outcome.failure, outcome.detail = "skipped", "an earlier turn failed"
                continue
            if turn.pause_s:
                await asyncio.sleep(turn.pause_s)
            body = request_body(self.target.model, [*history, *turn.messages], turn)
            await ask(
                self.target.port, body, outcome, origin=self.origin, timeout_s=self.target.timeout_s,
                key=self.target.key(client.group), leave_after_chars=turn.leave_after_chars,
                on_first=first, until=until,
            )  # fmt: skip
            if client.history:
                history += [*turn.messages, {"role": "assistant", "content": outcome.text}]
                broken = outcome.failure is not None

    async def freed(self, leavers: str) -> float | None:
        """Seconds from the end of a group until the server runs no more sequences than clients are left."""
        await self.groups[leavers].ended.wait()
        start = time.perf_counter()
        while time.perf_counter() - start < FREED_WITHIN_S:
            left = sum(group.size - group.n_ended for group in self.groups.values())
            metrics = await get(self.target.port, "/metrics", key=self.target.key(leavers))
            running = gauge(metrics, self.target.running_metric)
            if running is not None and running <= left:
                return time.perf_counter() - start
            await asyncio.sleep(POLL_S)
        return None

    async def footprint(self) -> Footprint | None:
        """What the server holds, every few seconds until all clients are through."""
        if self.target.held_bytes is None:
            return None
        return await watched(
            self.target.port, self.target.held_bytes, self.target.key(""), origin=self.origin,
            n_ended=lambda: sum(outcome.ended_s > 0 for outcome in self.outcomes),
            over=lambda: all(group.ended.is_set() for group in self.groups.values()),
        )  # fmt: skip


async def run_round(
    target: Target, clients: Sequence[Client], *, leavers: str | None = None, watch_memory: bool = False
) -> Round:
    """Carry out a plan until every client is through. `leavers`: the group whose slots are watched."""
    if len(clients) > MAX_CLIENTS:
        raise ValueError(f"{len(clients)} clients; at most {MAX_CLIENTS} are loaded from one process")
    load, cpu_s = _Load(target, clients), time.process_time()
    async with asyncio.TaskGroup() as tasks:
        memory = tasks.create_task(load.footprint()) if watch_memory else None
        for number, client in enumerate(clients):
            tasks.create_task(load.live(number, client))
        watch = tasks.create_task(load.freed(leavers)) if leavers else None
    freed_s = watch.result() if watch else None
    held = memory.result() if memory else None
    return Round(load.outcomes, freed_s, time.process_time() - cpu_s, footprint=held)


def request_body(model: str, messages: Sequence[Message], turn: Turn) -> dict[str, Any]:
    """What both servers take; nothing here is an extension that only one of them knows."""
    return {
        "model": model,
        "messages": list(messages),
        "max_tokens": turn.max_tokens,
        "temperature": 0,
        "ignore_eos": turn.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def gauge(exposition: bytes, name: str) -> float | None:
    """The sum of a Prometheus gauge over its labels; None when it is not there."""
    values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", exposition.decode(), re.MULTILINE)
    return sum(map(float, values)) if values else None
