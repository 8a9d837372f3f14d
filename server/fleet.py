"""Engines that start when somebody needs one and end to make room: one process a configuration.

Counts bytes and users; what a model is and how its engine starts it is told. All decisions fall in `_settle`,
which runs after every change and never waits, so that no request can meet an engine that is being closed.
Who waits for a load waits in a fair queue (engine/fairness.py): one key's flood leaves others their share.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.fairness import FairQueue
from engine.request import EngineConfig, EngineUnavailable, QueueFull, Tenant
from models.placement import Bytes
from server.engines import Engine, Plan, Start
from server.errors import ModelTooLarge

LOG = logging.getLogger("lq.server")

#: A model that waits for room lets busy ones take new requests for so long; then they only finish what they
#: have. Shorter, two models that take turns would load more than they answer.
PATIENCE_S = 5.0
#: Told to a client that finds the queue of a loading model full.
FULL_RETRY_S = 5.0

State = Literal["unloaded", "loading", "ready", "failed", "down", "closing"]


class Timer(Protocol):
    """What `call_later` gives."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Seconds that go on, and calls at a time to come; a test has its own."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer: ...


class _LoopClock:
    """Real time; calls come from the event loop that runs."""

    def time(self) -> float:
        return time.monotonic()

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)


@dataclass(frozen=True, slots=True)
class Member:
    """An engine that may run: what it takes of each memory, and how long it stays without a request."""

    name: str
    config: EngineConfig
    size: Bytes
    keep_alive_s: float | None = None  # None: until its room is needed
    preload: bool = False


def members(plans: Iterable[Plan]) -> list[Member]:
    """One for each distinct configuration; it stays as long as any of its plans asks for."""
    found: dict[EngineConfig, Member] = {}
    for plan in plans:
        keep_alive_s, preload = plan.keep_alive_s, plan.preload
        if (known := found.get(plan.config)) is not None:
            endless = None in (keep_alive_s, known.keep_alive_s)
            keep_alive_s = None if endless else max(keep_alive_s or 0.0, known.keep_alive_s or 0.0)
            preload = preload or known.preload
        name = known.name if known else plan.name
        found[plan.config] = Member(name, plan.config, plan.footprint.place, keep_alive_s, preload)
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Standing:
    """How an engine is doing."""

    member: Member
    state: State
    engine: Engine | None  # while it is ready or down
    users: int  # requests that hold it
    waiting: int  # requests that wait for it to load
    idle_s: float | None  # None: it is not loaded, or in use
    problem: str | None  # why it did not load the last time


@dataclass(eq=False, slots=True)
class _Turn:
    """A request that waits for an engine; `seated` is done when it has one, or never will."""

    number: int  # in the order of asking
    tenant: Tenant
    seated: asyncio.Future[None]


@dataclass(eq=False, slots=True)
class _Place:
    """A member's own; `state` is of its life, `drains` for as long as it may take no new users."""

    member: Member
    state: Literal["unloaded", "loading", "ready", "closing"] = "unloaded"
    engine: Engine | None = None
    users: int = 0
    waiting: FairQueue[_Turn] = field(default_factory=FairQueue)
    since_s: float = 0.0  # when the first of those that wait came
    used_s: float = 0.0  # when somebody last took or gave it back
    drains: bool = False
    problem: Exception | None = None
    task: asyncio.Task[None] | None = None

    @property
    def idle(self) -> bool:
        return self.state == "ready" and not self.users

    @property
    def held(self) -> Bytes:
        return Bytes(0) if self.state == "unloaded" else self.member.size

    def is_full_for(self, tenant: Tenant) -> bool:
        """Whether another request of a tenant would be one too many, as the engine itself will see it."""
        config = self.member.config
        n_waiting = len(self.waiting) + 1 - config.n_parallel
        return self.waiting.is_full_for(tenant, config.max_queue, n_waiting=n_waiting)

    def take_waiting(self) -> list[_Turn]:
        """All that wait, in the order of asking; nobody waits then."""
        turns = sorted(self.waiting, key=lambda turn: turn.number)
        self.waiting = FairQueue()
        return turns


class Fleet:
    """Hands out engines and keeps those that run within `budget` together, in host memory and on the GPU."""

    def __init__(
        self,
        members: Iterable[Member],
        start: Start,
        *,
        budget: Bytes,
        clock: Clock | None = None,
    ) -> None:
        self._places = {member.config: _Place(member) for member in members}
        self._start = start
        self.budget = budget
        self._clock = clock or _LoopClock()
        self._timer: Timer | None = None
        self._numbers = itertools.count()
        self._closed = False

    @asynccontextmanager
    async def lease(self, config: EngineConfig, tenant: Tenant = Tenant()) -> AsyncIterator[Engine]:  # noqa: B008
        """The engine, started if need be; it stays as long as somebody holds a lease of it.

        `tenant`: who asks, whose share of the places to wait in is limited while others want some.
        Raises ModelTooLarge, QueueFull, EngineUnavailable when the fleet closes, or what its start raises.
        """
        place = self._places[config]
        await self._take(place, tenant)
        try:
            assert place.engine is not None  # users keep it
            yield place.engine
        finally:
            self._give_back(place)

    def engine(self, config: EngineConfig) -> Engine:
        """The engine of a configuration that somebody holds a lease of."""
        engine = self._places[config].engine
        if engine is None:
            raise EngineUnavailable("the engine is not loaded")
        return engine

    async def preload(self) -> None:
        """Start what is to be there from the beginning, one after the other; raises the first error."""
        for place in self._places.values():
            if place.member.preload:
                async with self.lease(place.member.config):
                    pass

    async def close(self) -> None:
        """End every process, those that load included; whoever waits gets EngineUnavailable."""
        self._closed = True
        self._arm(None)
        for place in self._places.values():
            self._refuse(place, EngineUnavailable("the server stops"))
            if place.state == "loading" and place.task is not None:
                place.task.cancel()
            elif place.state == "ready":
                self._begin_closing(place)
        tasks = [place.task for place in self._places.values()]
        open_tasks = [task for task in tasks if task is not None and not task.done()]
        await asyncio.gather(*open_tasks, return_exceptions=True)

    @property
    def held(self) -> Bytes:
        """Estimated bytes of the engines that run, load or end."""
        return sum((place.held for place in self._places.values()), Bytes(0))

    def standing(self, config: EngineConfig) -> Standing:
        """How one is doing now."""
        place = self._places[config]
        state: State = place.state
        if place.state == "ready" and place.engine is not None and not place.engine.alive:
            state = "down"
        elif place.state == "unloaded" and place.problem is not None:
            state = "failed"
        return Standing(
            member=place.member,
            state=state,
            engine=place.engine if place.state == "ready" else None,
            users=place.users,
            waiting=len(place.waiting),
            idle_s=max(0.0, self._clock.time() - place.used_s) if place.idle else None,
            problem=str(place.problem) if place.problem is not None else None,
        )

    async def _take(self, place: _Place, tenant: Tenant) -> None:
        if self._closed:
            raise EngineUnavailable("the server stops")
        if place.state == "ready" and not place.drains:
            self._seat(place)
            return
        if not place.member.size.within(self.budget):
            raise ModelTooLarge(place.member.name, place.member.size, self.budget)
        if place.is_full_for(tenant):
            raise QueueFull(len(place.waiting), FULL_RETRY_S)
        if not place.waiting:
            place.since_s = self._clock.time()
        seated: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        turn = _Turn(next(self._numbers), tenant, seated)
        place.waiting.add(turn)
        self._settle()
        try:
            await seated
        except asyncio.CancelledError:
            if seated.done() and not seated.cancelled() and seated.exception() is None:
                self._give_back(place)  # it was seated in the same moment
            elif turn in place.waiting:
                place.waiting.remove(turn)
                self._settle()
            raise

    def _seat(self, place: _Place) -> None:
        place.users += 1
        place.used_s = self._clock.time()

    def _give_back(self, place: _Place) -> None:
        place.users -= 1
        place.used_s = self._clock.time()
        self._settle()

    def _settle(self) -> None:
        """Bring everything to where it should be now: close, start, seat; then set the alarm."""
        if self._closed:
            return
        now = self._clock.time()
        for place in self._places.values():
            place.drains = False
            if place.idle and not place.waiting and now >= _expiry(place):
                self._begin_closing(place)
        self._make_room(now)
        for place in self._places.values():
            if place.state == "ready" and not place.drains:
                self._seat_waiting(place)
        self._arm(now)

    def _make_room(self, now: float) -> None:
        """Start what is wanted, in the order of asking; what does not fit yet keeps the rest waiting."""
        wanted = [place for place in self._places.values() if place.state == "unloaded" and place.waiting]
        for place in sorted(wanted, key=lambda each: each.since_s):
            if place.member.size.within(self.budget - self.held):
                self._begin_loading(place)
                continue
            is_urgent = now - place.since_s >= PATIENCE_S
            for victim in self._victims(place.member.size, or_busy=is_urgent):
                victim.drains = True
                if victim.idle:
                    self._begin_closing(victim)
            return

    def _victims(self, size: Bytes, *, or_busy: bool) -> list[_Place]:
        """Engines to end so that this size fits: idle ones, then busy ones, each least recently used first.

        Only those that hold of a memory that is short. Empty while what may be ended is not enough, or what
        is ending already is.
        """
        ending = sum((place.held for place in self._places.values() if place.state == "closing"), Bytes(0))
        room = self.budget - self.held + ending
        ready = [place for place in self._places.values() if place.state == "ready"]
        victims = []
        for place in sorted(ready, key=lambda each: (each.users > 0, each.used_s)):
            if size.within(room):
                break
            helps = (size.host > room.host and place.held.host) or (
                size.device > room.device and place.held.device
            )
            if helps and (place.idle or or_busy):
                victims.append(place)
                room += place.held
        return victims if size.within(room) else []

    def _seat_waiting(self, place: _Place) -> None:
        for turn in place.take_waiting():
            if not turn.seated.done():  # else its owner was cancelled and will not take it
                self._seat(place)
                turn.seated.set_result(None)

    def _refuse(self, place: _Place, error: Exception) -> None:
        for turn in place.take_waiting():
            if not turn.seated.done():
                turn.seated.set_exception(error)

    def _begin_loading(self, place: _Place) -> None:
        place.state, place.problem = "loading", None
        place.task = asyncio.create_task(self._load(place))

    async def _load(self, place: _Place) -> None:
        try:
            engine = await self._start(place.member.config)
        except asyncio.CancelledError:
            place.state = "unloaded"
            raise
        except Exception as error:  # of whatever kind: those that wait would wait for ever
            place.state, place.problem = "unloaded", error
            self._refuse(place, error)
        else:
            place.state, place.engine, place.used_s = "ready", engine, self._clock.time()
            self._seat_waiting(place)  # before anybody can think it idle
        self._settle()

    def _begin_closing(self, place: _Place) -> None:
        place.state = "closing"
        place.task = asyncio.create_task(self._close(place))

    async def _close(self, place: _Place) -> None:
        engine, place.engine = place.engine, None
        try:
            if engine is not None:
                await engine.close()
        except Exception:  # its room counts as free, for good or ill: nobody could use the engine any more
            LOG.exception("the engine of %s did not end as it should", place.member.name)
        place.state = "unloaded"
        self._settle()

    def _arm(self, now: float | None) -> None:
        """Settle again when the next keep-alive or patience ends; `now` None: never."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if now is None:
            return
        due = [_expiry(place) for place in self._places.values() if place.idle and not place.waiting]
        due += [
            place.since_s + PATIENCE_S
            for place in self._places.values()
            if place.state == "unloaded" and place.waiting and now < place.since_s + PATIENCE_S
        ]
        first = min(due, default=float("inf"))
        if first < float("inf"):
            self._timer = self._clock.call_later(max(0.0, first - now), self._settle)


def _expiry(place: _Place) -> float:
    keep_alive_s = place.member.keep_alive_s
    return float("inf") if keep_alive_s is None else place.used_s + keep_alive_s
