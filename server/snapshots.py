"""What each engine told of itself last, and how long ago that was.

An engine answers between two calls of its model, and one call may take seconds: until then its last figures
are the best there are.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from engine.request import EngineError
from engine.stats import EngineStats
from server.engines import Engine
from server.fleet import Standing

#: Whoever asks for figures gets those of the last time when the engine has not answered by then.
ASK_S = 2.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Figures of a running engine; `age_s` since they were true."""

    stats: EngineStats
    age_s: float


@dataclass(frozen=True, slots=True)
class Told:
    """All that is known of one engine now; `snapshot` is None unless it runs and has told something."""

    standing: Standing
    names: tuple[str, ...]  # of models and assistants that it answers for
    snapshot: Snapshot | None


@dataclass(slots=True)
class _Seen:
    """Of one engine; its `stats` are those of the process `pid`."""

    stats: EngineStats | None = None
    pid: int | None = None
    at_s: float = 0.0
    asking: asyncio.Task[None] | None = None


class Snapshots:
    """Asks engines, one question at a time each; an answer that comes late is there for the next who asks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: WeakKeyDictionary[Engine, _Seen] = WeakKeyDictionary()

    async def of(self, engine: Engine | None) -> Snapshot | None:
        """An engine's figures; None when there is no process, or it never told any."""
        if engine is None or not engine.alive:  # it would answer after its restart
            return None
        seen = self._seen.setdefault(engine, _Seen())
        if seen.asking is None or seen.asking.done():
            seen.asking = asyncio.create_task(self._ask(engine, seen))
        await asyncio.wait({seen.asking}, timeout=ASK_S)
        if seen.stats is None or not engine.alive or seen.pid != engine.pid:
            return None
        return Snapshot(seen.stats, self._clock() - seen.at_s)

    async def _ask(self, engine: Engine, seen: _Seen) -> None:
        try:
            stats = await engine.stats()
        except EngineError:  # its process ended
            return
        seen.stats, seen.pid, seen.at_s = stats, engine.pid, self._clock()
