"""Embedders in a thread of their own, behind a bounded queue: the event loop never waits for a matrix.

Loads each on first use. Batches of one job take turns with those of others: whose turn it is says the fair
queue (engine/fairness.py), in which a job stands again and again, once for each batch.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from engine.bounds import CHARACTERS_PER_TOKEN, is_too_long
from engine.fairness import FairQueue
from engine.request import EngineUnavailable, Pooled, Read, Tenant
from models.placement import Bytes
from server.errors import BadRequest, EmbedderBusy

T = TypeVar("T")

#: Texts of one turn of the thread.
BATCH = 32
#: About what English has; how many there are is known when they have been read.
CHARACTERS_A_TOKEN = 4
#: What an embedder takes beside its weights: torch, and a part of the weights' size to compute in. Measured
#: with weights of 91 MB: 460 MB when loaded, 550 MB after 32 texts of 256 tokens.
TORCH_BYTES = 400 << 20
TORCH_DEVICE_BYTES = 512 << 20
COMPUTE_SHARE = 0.5


def memory(folder: Path, *, on_gpu: bool) -> Bytes:
    """What the embedder in a folder takes when it is loaded, an estimate from the sizes of its files."""
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    taken = int(weights * (1 + COMPUTE_SHARE))
    return Bytes(TORCH_BYTES + taken, TORCH_DEVICE_BYTES + taken if on_gpu else 0)


class Embedder(Protocol):
    """What the server asks of an embedder (rag.embed.Embedder is one)."""

    fingerprint: str
    name: str

    @property
    def dimension(self) -> int: ...

    @property
    def max_tokens(self) -> int: ...

    def documents(self, texts: Sequence[str]) -> np.ndarray: ...

    def queries(self, texts: Sequence[str]) -> np.ndarray: ...

    def count_tokens(self, text: str) -> int: ...


class TooLong(BadRequest):
    def __init__(self, place: str, size: str, limit: str, *, reader: str = "embedder") -> None:
        problem = f"{place} has {size} and the {reader} reads {limit}: split the text"
        super().__init__(problem, param=place, code="context_length_exceeded")


@dataclass(frozen=True, slots=True)
class _Turn:
    """What a job does with the thread at a time; `n_tokens`: about how many it reads."""

    n_tokens: int
    work: Callable[[Embedder], Any]


@dataclass(eq=False, slots=True)
class _Job:
    """Turns to come, and what those that began will give; it is in the queue while some are to come."""

    name: str  # of the embedder
    tenant: Tenant
    turns: deque[_Turn]
    results: asyncio.Queue[asyncio.Future[Any]] = field(default_factory=asyncio.Queue)


class EmbedderThread:
    """The one thread that embeds; `load` turns a name into an embedder and runs there too."""

    def __init__(self, load: Callable[[str], Embedder], *, max_queue: int) -> None:
        """`max_queue`: jobs that may wait beside the one that runs."""
        self._load = load
        self._max_queue = max_queue
        self._queue: FairQueue[_Job] = FairQueue()
        self._n_jobs = 0
        self._is_busy = False
        self._is_closed = False
        self._embedders: dict[str, Embedder] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedder")

    @property
    def waiting(self) -> int:
        """Jobs that run or wait."""
        return self._n_jobs

    async def use(
        self,
        name: str,
        work: Callable[[Embedder], T],
        *,
        tenant: Tenant = Tenant(),  # noqa: B008
        n_tokens: int = 1,
    ) -> T:
        """The result of `work`, which reads about `n_tokens`, with the named embedder, run in the thread.

        Raises EmbedderBusy past the queue, EngineUnavailable when the server stops, or what `work` does.
        """
        async with aclosing(self._in_turns(name, tenant, [_Turn(n_tokens, work)])) as results:
            return await anext(results)

    async def embed(
        self,
        name: str,
        texts: Sequence[str],
        *,
        as_queries: bool,
        tenant: Tenant = Tenant(),  # noqa: B008
    ) -> AsyncGenerator[Read | Pooled, None]:
        """What was read batch by batch, at last all vectors, of length 1; what would be cut is refused.

        Closing the generator ends the work with the batch that runs. Raises TooLong or what `use` does.
        """
        starts = range(0, len(texts), BATCH)
        turns = [_batch(texts, start, as_queries=as_queries) for start in starts]
        rows: list[np.ndarray] = []
        n_tokens = 0
        async with aclosing(self._in_turns(name, tenant, turns)) as results:
            async for vectors, n_read in results:
                rows.append(vectors)
                n_tokens += n_read
                if len(rows) < len(turns):
                    yield Read(n_read)
        yield Pooled(np.concatenate(rows), n_tokens)

    async def close(self) -> None:
        """Let the running batch end; jobs that wait fail with EngineUnavailable."""
        self._is_closed = True
        for job in list(self._queue):
            self._drop(job)
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            future.set_exception(EngineUnavailable("the server stops"))
            job.results.put_nowait(future)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _in_turns(self, name: str, tenant: Tenant, turns: Sequence[_Turn]) -> AsyncGenerator[Any, None]:
        """The result of each turn; what has not begun when this is closed is dropped."""
        if self._is_closed:
            raise EngineUnavailable("the server stops")
        if self._queue.is_full_for(tenant, self._max_queue, n_waiting=len(self._queue) + 1):
            raise EmbedderBusy(len(self._queue))
        job = _Job(name, tenant, deque(turns))
        self._n_jobs += 1
        self._queue.add(job)
        self._next()
        try:
            for _ in turns:
                running = await job.results.get()
                yield await asyncio.shield(running)  # what runs in a thread cannot be stopped
        finally:
            self._n_jobs -= 1
            self._drop(job)

    def _next(self) -> None:
        """Let the job that deserves it most have the thread, if it is free."""
        ready = self._queue.ready()
        if self._is_busy or self._is_closed or not ready:
            return
        job = ready[0]
        turn = job.turns.popleft()
        self._is_busy = True
        self._queue.called()
        self._queue.started(job)
        self._queue.charge(job, turn.n_tokens)
        if job.turns:
            self._queue.add(job)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._thread, lambda: turn.work(self._get(job.name)))
        running.add_done_callback(partial(self._ended, job))
        job.results.put_nowait(running)

    def _ended(self, job: _Job, running: asyncio.Future[Any]) -> None:
        """The thread is free; a job of which a turn failed has no more."""
        if running.cancelled() or running.exception() is not None:
            self._drop(job)
        self._is_busy = False
        self._queue.ended(job)
        self._next()

    def _drop(self, job: _Job) -> None:
        """Forget the turns of a job that have not begun."""
        if job.turns:
            job.turns.clear()
            self._queue.remove(job)

    def _get(self, name: str) -> Embedder:
        if name not in self._embedders:
            self._embedders[name] = self._load(name)
        return self._embedders[name]


def _batch(texts: Sequence[str], start: int, *, as_queries: bool) -> _Turn:
    """The turn that embeds the batch which begins at `start`: vectors, and tokens read."""
    batch = texts[start : start + BATCH]

    def work(embedder: Embedder) -> tuple[np.ndarray, int]:
        n_tokens = sum(
            _counted(embedder, text, f"input[{number}]" if len(texts) > 1 else "input")
            for number, text in enumerate(batch, start=start)
        )
        embed = embedder.queries if as_queries else embedder.documents
        return embed(batch), n_tokens

    return _Turn(1 + sum(map(len, batch)) // CHARACTERS_A_TOKEN, work)


def _counted(embedder: Embedder, text: str, place: str) -> int:
    """Tokens of a text; TooLong for more than the embedder reads."""
    limit = embedder.max_tokens
    if is_too_long(len(text), limit):  # counting the tokens of 10 MB takes gigabytes
        most = f"{limit} tokens, never more than {CHARACTERS_PER_TOKEN * limit} characters"
        raise TooLong(place, f"{len(text)} characters", most)
    n_tokens = embedder.count_tokens(text)
    if n_tokens > limit:
        raise TooLong(place, f"{n_tokens} tokens", str(limit))
    return n_tokens
