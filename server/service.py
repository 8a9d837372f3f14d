"""Everything that answers requests, opened together and closed together; HTTP lies above it."""

import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

from engine.request import Delta, Done, EngineError, EngineStats, Event
from models.store import Store
from server import generate
from server.auth import Hosts, Keys, read_keys
from server.embedding import Embedder, EmbedderThread
from server.engines import Start, plan, running
from server.grounding import Retriever
from server.metrics import Metrics
from server.roster import Roster
from server.settings import Settings
from server.work import Work


@dataclass(slots=True)
class Service:
    """Handed to every route."""

    settings: Settings
    roster: Roster
    embedders: EmbedderThread
    keys: Keys
    hosts: Hosts
    metrics: Metrics = field(default_factory=Metrics)

    @property
    def limit_bytes(self) -> int:
        return int(self.settings.server.max_body_mb * 2**20)

    async def run(self, work: Work, started: float) -> AsyncIterator[tuple[int, Event]]:
        """The events of a request, counted; `started` is when it came, by time.perf_counter."""
        name = work.target.name
        is_first = True
        async for index, event in generate.events(work.target.engine, work.requests):
            if is_first and isinstance(event, Delta):
                is_first = False
                self.metrics.first_token.labels(name).observe(time.perf_counter() - started)
            if isinstance(event, Done):
                self.metrics.count(name, event)
            yield index, event

    async def stats(self) -> dict[str, EngineStats | None]:
        """Figures of every engine; None for one that does not answer."""
        found: dict[str, EngineStats | None] = {}
        for name, engine in self.roster.engines.items():
            try:
                found[name] = await engine.stats()
            except EngineError:
                found[name] = None
        return found


@asynccontextmanager
async def opened(
    settings: Settings,
    *,
    keys: Keys | None = None,
    store: Store | None = None,
    start: Start | None = None,
    load_embedder: Callable[[str], Embedder] | None = None,
) -> AsyncIterator[Service]:
    """The service of the settings; whatever cannot be opened is reported before anything is served.

    `keys`: those that may ask, by default what the settings and the environment say.
    """
    keys = read_keys(settings) if keys is None else keys
    store = store or Store.default()
    plans = plan(settings, store)
    embedders = EmbedderThread(
        load_embedder or _embedder_loader(store), max_queue=settings.embedder.max_queue
    )
    retriever = Retriever(store.root / "collections", embedders)
    try:
        async with running(plans, start or _start_engine) as engines:
            roster = Roster(settings, plans=plans, engines=engines, retriever=retriever)
            yield Service(settings, roster, embedders, keys, Hosts(settings))
    finally:
        await embedders.close()
        retriever.close()


async def _start_engine(config):
    from engine.client import Engine

    return await Engine.start(config)


def _embedder_loader(store: Store) -> Callable[[str], Embedder]:
    def load(name: str) -> Embedder:
        from rag.embed import Embedder as LocalEmbedder

        return LocalEmbedder.load(store.resolve_embedder(name), name=name)

    return load


def fingerprint() -> str:
    """OpenAI's `system_fingerprint`: what, beside the seed, decides a repeatable answer."""
    parts = []
    for package in ("lq", "llama-cpp-python"):
        try:
            parts.append(version(package))
        except PackageNotFoundError:  # run from a checkout that was not installed
            parts.append("source")
    return "fp_" + hashlib.sha256("/".join([*parts, os.uname().machine]).encode()).hexdigest()[:12]
