"""Passages of a collection -> numbered sources that fit the context; the question is never dropped.

Knows the search and the prompt, nothing of HTTP.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from engine.request import Tenant
from models.errors import ModelsError
from prompts.message import Source as PromptSource
from rag.collection import Collection, CollectionInfo, InvalidName, Passage, UnknownCollection, directory_of
from rag.errors import RagError
from rag.settings import rebuild_command
from server.embedding import CHARACTERS_A_TOKEN, Embedder, EmbedderThread
from server.errors import BadRequest, CollectionUnavailable, ServerError
from server.schema.usage import Source

DEFAULT_PASSAGES = 5
#: Room that passages leave for the answer when the request does not say how long it may be.
ANSWER_TOKENS = 512
#: A longer question is searched for with its last characters: people ask behind what they paste, and an
#: embedder reads a few hundred tokens at most. The model still gets all of it.
SEARCHED_CHARACTERS = 2000

Count = Callable[[Sequence[Passage]], Awaitable[int]]


class EmbedderChanged(ServerError):
    def __init__(self, built: CollectionInfo, *, found: str) -> None:
        repair = rebuild_command(built.name, built.roots, embedder=built.embedder)
        super().__init__(
            f"it was built with the embedder {built.embedder!r} ({built.embedder_fingerprint}), which has "
            f"changed since ({found}): build it again with: {repair}"
        )


class Retriever:
    """Searches collections by name; opens each once."""

    def __init__(self, root: Path, thread: EmbedderThread) -> None:
        self._root = root
        self._thread = thread
        self._open: dict[str, Collection] = {}
        self._lock = threading.Lock()

    async def check(self, name: str) -> None:
        """Raise unless the collection exists and the embedder that it was built with is here, unchanged."""
        info = await asyncio.to_thread(lambda: self._collection(name).info())

        def compare(embedder: Embedder) -> None:
            if embedder.fingerprint != info.embedder_fingerprint:
                raise EmbedderChanged(info, found=embedder.fingerprint)

        await self._thread.use(info.embedder, compare)

    async def search(
        self,
        name: str,
        question: str,
        *,
        k: int,
        tenant: Tenant = Tenant(),  # noqa: B008
    ) -> list[Passage]:
        """The best passages, best first, found with the embedder that the collection was built with."""
        question = question.strip()[-SEARCHED_CHARACTERS:]
        if not question:
            raise BadRequest(
                "the last user message is empty: there is nothing to search for", param="messages"
            )
        try:
            collection, embedder_name = await asyncio.to_thread(self._open_with_embedder, name)
            return await self._thread.use(
                embedder_name,
                lambda embedder: collection.search(question, k=k, embedder=embedder),
                tenant=tenant,
                n_tokens=1 + len(question) // CHARACTERS_A_TOKEN,
            )
        except (InvalidName, UnknownCollection):
            raise
        except (ModelsError, RagError) as error:  # such as an embedder that was removed or replaced
            raise CollectionUnavailable(name, error) from error

    def _open_with_embedder(self, name: str) -> tuple[Collection, str]:
        collection = self._collection(name)
        return collection, collection.info().embedder

    def close(self) -> None:
        for collection in self._open.values():
            collection.close()

    def _collection(self, name: str) -> Collection:
        directory = directory_of(self._root, name)
        with self._lock:
            if name not in self._open:
                self._open[name] = Collection.open(directory)
            return self._open[name]


async def fitting(passages: Sequence[Passage], count: Count, *, budget: int) -> list[Passage]:
    """The most of the best passages whose whole prompt has at most `budget` tokens; `count` renders it."""
    low, high = 0, len(passages)
    if not passages or await count(passages) <= budget:
        return list(passages)
    if await count(()) > budget:  # a long question: each further count would take as long
        return []
    while high - low > 1:
        middle = (low + high) // 2
        if await count(passages[:middle]) <= budget:
            low = middle
        else:
            high = middle
    return list(passages[:low])


def budget(n_ctx: int, max_tokens: int | None) -> int:
    """Tokens that the prompt may have, so that an answer fits behind it."""
    reserve = ANSWER_TOKENS if max_tokens is None else max_tokens
    return n_ctx - min(reserve, n_ctx // 2)


def for_prompt(passages: Sequence[Passage]) -> list[PromptSource]:
    """Passages numbered from 1, as a prompt file sees them."""
    return [
        PromptSource(number, each.title, each.file, _page(each), each.heading or None, each.text)
        for number, each in enumerate(passages, start=1)
    ]


def for_answer(passages: Sequence[Passage]) -> list[Source]:
    """The same passages as the client gets them."""
    return [
        Source(
            index=number,
            file=passage.file,
            title=passage.title,
            page=_page(passage),
            heading=passage.heading or None,
            start=passage.start,
            end=passage.end,
            quote=passage.text,
            score=passage.score,
        )
        for number, passage in enumerate(passages, start=1)
    ]


def _page(passage: Passage) -> int | None:
    """The page of what matched best, on which the reader should look first."""
    return passage.page_at(passage.best[0])
