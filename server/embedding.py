"""Embedders in a thread of their own, behind a bounded queue: the event loop never waits for a matrix.

Loads each on first use. Batches of one job take turns with those of others.
"""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from models.placement import Bytes
from server.errors import BadRequest, EmbedderBusy

T = TypeVar("T")

#: Texts of one turn of the thread.
BATCH = 32
#: Texts of more characters for each token that the embedder reads are refused uncounted: counting the tokens
#: of 10 MB takes gigabytes. Prose has 2 to 6, the longest words of a vocabulary about 20.
CHARACTERS_PER_TOKEN = 64
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


class EmbedderThread:
    """The one thread that embeds; `load` turns a name into an embedder and runs there too."""

    def __init__(self, load: Callable[[str], Embedder], *, max_queue: int) -> None:
        self._load = load
        self._max_queue = max_queue
        self._waiting = 0
        self._embedders: dict[str, Embedder] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="embedder")

    @property
    def waiting(self) -> int:
        """Jobs that run or wait."""
        return self._waiting

    async def use(self, name: str, work: Callable[[Embedder], T]) -> T:
        """The result of `work` with the named embedder, run in the thread; EmbedderBusy past the queue."""
        if self._waiting >= self._max_queue:
            raise EmbedderBusy(self._waiting)
        self._waiting += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._thread, lambda: work(self._get(name)))
        finally:
            self._waiting -= 1

    async def embed(self, name: str, texts: Sequence[str], *, as_queries: bool) -> tuple[np.ndarray, int]:
        """(vectors (n, dimension) float32 of length 1, tokens read); texts that would be cut are refused."""
        n_tokens = 0
        rows = []
        for first in range(0, len(texts), BATCH):
            batch = texts[first : first + BATCH]

            def work(embedder: Embedder, batch=batch, first=first) -> tuple[np.ndarray, int]:
                n_tokens = sum(
                    _counted(embedder, text, f"input[{number}]" if len(texts) > 1 else "input")
                    for number, text in enumerate(batch, start=first)
                )
                embed = embedder.queries if as_queries else embedder.documents
                return embed(batch), n_tokens

            vectors, count = await self.use(name, work)
            rows.append(vectors)
            n_tokens += count
        return np.concatenate(rows), n_tokens

    async def close(self) -> None:
        """Let the running batch end and drop the rest."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _get(self, name: str) -> Embedder:
        if name not in self._embedders:
            self._embedders[name] = self._load(name)
        return self._embedders[name]


def _counted(embedder: Embedder, text: str, place: str) -> int:
    """Tokens of a text; TooLong for more than the embedder reads."""
    limit = embedder.max_tokens
    if len(text) > CHARACTERS_PER_TOKEN * limit:
        most = f"{limit} tokens, never more than {CHARACTERS_PER_TOKEN * limit} characters"
        raise TooLong(place, f"{len(text)} characters", most)
    n_tokens = embedder.count_tokens(text)
    if n_tokens > limit:
        raise TooLong(place, f"{n_tokens} tokens", str(limit))
    return n_tokens
