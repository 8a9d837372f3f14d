"""Everything that answers requests, opened together and closed together; HTTP lies above it."""

import asyncio
import hashlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from engine.request import ContextOverflow, Delta, Done, Event
from models.errors import ModelsError
from models.store import Store, UnknownModel
from rag.errors import RagError
from server import generate
from server.auth import Hosts, Keys, read_keys
from server.budget import budget
from server.embedding import Embedder, EmbedderThread
from server.engines import Start, plan
from server.errors import ClientGone, Failure, PromptTooLong, ServerError, logged
from server.fleet import Fleet, members
from server.grounding import Retriever
from server.key_settings import policy
from server.limits import Usage
from server.machine import Machine, this_machine
from server.metrics import Metrics
from server.prefix_folders import Claims
from server.roster import Roster
from server.settings import DEFAULT_EMBEDDER, Settings, SettingsError
from server.snapshots import Snapshots, Told
from server.ticket import Accounts, Ticket
from server.work import Work

#: Failures that are the state of the server or the key, not of the request.
REFUSALS = {401, 429, 503, 504}


@dataclass(slots=True)
class Service:
    """Handed to every route."""

    settings: Settings
    roster: Roster
    embedders: EmbedderThread
    keys: Keys
    hosts: Hosts
    metrics: Metrics = field(default_factory=Metrics)
    snapshots: Snapshots = field(default_factory=Snapshots)
    clock: Callable[[], float] = time.monotonic  # of the tokens a minute
    accounts: Accounts = field(init=False)

    def __post_init__(self) -> None:
        keys, limits = self.settings.keys, self.settings.limits
        policies = [policy(name, keys.get(name), limits) for name in self.keys.names]
        self.accounts = Accounts(policies, self.metrics.keys, clock=self.clock)

    @property
    def limit_bytes(self) -> int:
        return int(self.settings.server.max_body_mb * 2**20)

    def admit(self, scope: Any) -> Ticket:
        """The ticket of a request, which the gate closes; raises Refused when its key has no room for it."""
        ticket = scope["lq_ticket"] = self.accounts.ticket(scope.get("lq_key", ""))
        ticket.enter()
        return ticket

    def failed(self, error: BaseException, scope: Any) -> Failure:
        """What to tell of an error of a request, which is logged and counted as one of its key."""
        failure = logged(error, request_id=scope["lq_request_id"])
        if failure.status in REFUSALS:
            self.metrics.keys.refused(scope.get("lq_key", ""), failure.code)
        ticket: Ticket | None = scope.get("lq_ticket")
        if ticket and not isinstance(error, ClientGone):
            ticket.forgive()
        return failure

    async def run(self, work: Work, ticket: Ticket) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of a request, counted, within the limits of its key."""
        name = work.target.name
        work.check()
        try:
            sizes = await ticket.in_time(work.prompt_sizes(count_texts=ticket.is_metered), is_first=True)
        except ContextOverflow as error:
            raise PromptTooLong(error, work.prompt_field) from None
        usage = Usage(sizes, n_choices=work.n_choices)
        ticket.reserve(usage, n_answer=work.longest_answer(sizes))
        requests = work.on_behalf_of(ticket.policy)
        is_first = True
        async with aclosing(generate.events(work.target.engine, requests)) as events:
            try:
                while found := await ticket.in_time(_next(events), is_first=is_first):
                    index, event = found
                    if is_first and isinstance(event, Delta):
                        self.metrics.first_token.labels(name).observe(ticket.age_s)
                    if isinstance(event, Done):
                        self.metrics.count(name, event)
                    is_first = False
                    ticket.saw(index, event)
                    yield found
                ticket.settle()
            except ContextOverflow as error:
                raise PromptTooLong(error, work.prompt_field) from None

    async def engines(self) -> list[Told]:
        """What is known of every engine; all that run are asked at once."""
        engines = [standing.engine for standing in self.roster.standings().values()]
        found = await asyncio.gather(*map(self.snapshots.of, engines))
        now = self.roster.standings().values()  # one that was unloaded meanwhile has no figures any more
        return [
            Told(standing, tuple(self.roster.names(standing)), each if standing.engine is engine else None)
            for standing, engine, each in zip(now, engines, found, strict=True)
        ]

    async def exposition(self) -> bytes:
        """All figures as Prometheus reads them."""
        self.metrics.embedding_jobs.set(self.embedders.waiting)
        engines, fleet = await self.engines(), self.roster.fleet
        return self.metrics.text(engines, budget=fleet.budget, held=fleet.held)


async def _next(events: AsyncIterator[tuple[int, Event]]) -> tuple[int, Event] | None:
    """The next event; None at the end."""
    try:
        return await anext(events)
    except StopAsyncIteration:
        return None


@asynccontextmanager
async def opened(
    settings: Settings,
    *,
    keys: Keys | None = None,
    store: Store | None = None,
    start: Start | None = None,
    load_embedder: Callable[[str], Embedder] | None = None,
    machine: Machine | None = None,
) -> AsyncIterator[Service]:
    """The service of the settings; whatever cannot be opened is reported before anything is served.

    `keys`: those that may ask, by default what the settings and the environment say. `machine`: what there is
    for models, by default this one.
    """
    keys = read_keys(settings) if keys is None else keys
    hosts = Hosts(settings)
    store = store or Store.default()
    machine = machine or this_machine()
    plans = plan(settings, store, machine)
    claims = Claims(each.config.cache_folder for each in plans.values() if each.config.cache_folder)
    fleet = Fleet(members(plans.values()), start or _start_engine, budget=budget(settings, store, machine))
    embedder = _stored_embedder(settings, store)
    embedders = EmbedderThread(
        load_embedder or _embedder_loader(store), max_queue=settings.embedder.max_queue
    )
    retriever = Retriever(store.root / "collections", embedders)
    try:
        await _check_collections(settings, retriever)
        roster = Roster(settings, plans=plans, fleet=fleet, retriever=retriever, embedder=embedder)
        await fleet.preload()
        yield Service(settings, roster, embedders, keys, hosts)
    finally:
        await fleet.close()
        claims.close()
        await embedders.close()
        retriever.close()


def _stored_embedder(settings: Settings, store: Store) -> str | None:
    """The embedder's name; None when the default is not in the store: nobody may have asked for it."""
    name = settings.embedder.model
    try:
        store.resolve_embedder(name)
    except UnknownModel as error:
        if name != DEFAULT_EMBEDDER:
            raise SettingsError(f"embedder.model: {error}") from None
        return None
    return name


async def _check_collections(settings: Settings, retriever: Retriever) -> None:
    """What every assistant answers from is there and can be searched."""
    for name, assistant in settings.assistants.items():
        if assistant.collection is not None:
            try:
                await retriever.check(assistant.collection)
            except (ModelsError, RagError, ServerError) as error:
                problem = f"its collection {assistant.collection!r} cannot be searched: {error}"
                raise SettingsError(f"assistants.{name}: {problem}") from None


async def _start_engine(config):
    from engine.client import Engine

    return await Engine.start(config)


def _embedder_loader(store: Store) -> Callable[[str], Embedder]:
    def load(name: str) -> Embedder:
        from rag.embed import Embedder as LocalEmbedder

        path = store.resolve_embedder(name)
        return LocalEmbedder.load(path, name=path.name if path.parent == store.models else str(path))

    return load


@cache
def fingerprint() -> str:
    """OpenAI's `system_fingerprint`: what, beside the seed, decides a repeatable answer."""
    parts = []
    for package in ("lq", "llama-cpp-python"):
        try:
            parts.append(version(package))
        except PackageNotFoundError:  # run from a checkout that was not installed
            parts.append("source")
    return "fp_" + hashlib.sha256("/".join([*parts, os.uname().machine]).encode()).hexdigest()[:12]
