"""A server around a fake engine: one that says what it is told to, fails when told to, and remembers."""

import asyncio
import re
import time
from hashlib import sha256
from pathlib import Path

import httpx
import numpy as np
import pytest

from engine.request import (
    ContextOverflow,
    Delta,
    Done,
    EngineConfig,
    EngineInfo,
    EngineRestarted,
    InputTooLong,
    Pooled,
    Read,
    TokenLogprob,
)
from engine.stats import EngineStats
from models.footprint import Footprint
from models.placement import Bytes
from server.app import create_app
from server.auth import Hosts, Keys, accept
from server.embedding import EmbedderThread
from server.engines import Facts, Plan
from server.fleet import Fleet, members
from server.grounding import Retriever
from server.in_process import BASE_URL, InProcess
from server.key_settings import Key
from server.roster import Roster
from server.service import Service
from server.settings import Model, Settings, complete

CONTROL = re.compile(r"<\|im_(?:start|end)\|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257}


class FakeEngine:
    """Tokens are UTF-8 bytes; the answer is `says`, one delta a piece."""

    def __init__(self) -> None:
        self.says = ["Hel", "lo", "!"]
        self.fails: Exception | None = None  # before the first event
        self.breaks: Exception | None = None  # after the first event
        self.dies = False  # once, after the first event
        self.stall: asyncio.Event | None = None  # waited for before the first event
        self.pause: asyncio.Event | None = None  # waited for after the first event
        self.requests = []
        self.read: list[tuple[int, ...]] = []  # the prompts of `requests` as tokens
        self.cancelled = 0
        self.alive = True
        self.pid = 1
        self.info = EngineInfo(
            n_ctx=4000, n_parallel=4, n_ctx_train=4000, n_vocab=258, n_embd=8, n_params=10, size_bytes=10,
            architecture="fake", description="fake 10", chat_template=TEMPLATE, bos_token="", eos_token="",
            bos_id=None, eos_id=None, eot_id=None, add_bos=False, gpu=None, n_threads=1,
        )  # fmt: skip

    async def tokenize(self, text, *, add_special=True, parse_special=False):  # noqa: ARG002
        pieces = CONTROL.split(text) if parse_special else [text]
        marks = CONTROL.findall(text) if parse_special else []
        tokens = list(pieces[0].encode())
        for mark, piece in zip(marks, pieces[1:], strict=True):
            tokens += [SPECIAL[mark], *piece.encode()]
        return tokens

    async def detokenize(self, tokens):
        return bytes(tokens).decode()

    async def submit(self, request):
        request.validate()
        if isinstance(prompt := request.prompt, str):
            special = {"add_special": request.add_special, "parse_special": request.parse_special}
            prompt = await self.tokenize(prompt, **special)
        self.requests.append(request)
        self.read.append(tuple(prompt))
        n_prompt = len(prompt)
        if n_prompt >= self.info.n_ctx:
            raise ContextOverflow(n_prompt, self.info.n_ctx)
        if self.fails:
            raise self.fails
        ended = False
        try:
            if self.stall:
                await self.stall.wait()
            if self.dies:
                self.dies = False
                yield Delta(self.says[0], (1,), self._logprobs(request, self.says[0]), n_prompt)
                if not request.replayable:
                    raise EngineRestarted("died")
                yield Delta("", (), anew=True)
            for number, text in enumerate(self.says):
                yield Delta(text, (1,), self._logprobs(request, text), n_prompt if number == 0 else 0)
                if number == 0 and self.breaks:
                    raise self.breaks
                if number == 0 and self.pause:
                    await self.pause.wait()
            ended = True
            yield Done("stop", n_prompt, len(self.says), n_cached_tokens=3, prefill_s=0.5, decode_s=0.25)
        finally:
            self.cancelled += not ended

    def _logprobs(self, request, text):
        if request.logprobs is None:
            return ()
        top = tuple((n, b"x", -2.0) for n in range(request.logprobs))
        return (TokenLogprob(1, text.encode(), -0.5, top),)

    async def pool(self, request):
        """One call for the first text, another for the rest."""
        request.validate()
        self.requests.append(request)
        ended = False
        try:
            if self.stall:
                await self.stall.wait()
            rows, counts = self._pooled([(request.query or "") + text for text in request.inputs])
            if len(rows) > 1:
                yield Read(counts[0])
            if self.pause:
                await self.pause.wait()
            ended = True
            yield Pooled(rows if request.query is None else rows[:, 0], sum(counts))
        finally:
            self.cancelled += not ended

    def _pooled(self, texts):
        """Letters, of them `a`, 1, and zeros; and words. A text of more than 20 of them is too long."""
        for index, text in enumerate(texts):
            if len(text.split()) > 20:
                raise InputTooLong(index, f"{len(text.split())} tokens", "20")
        if self.fails:
            raise self.fails
        rows = np.array([[len(text), text.count("a"), 1, 0, 0, 0, 0, 0] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True), [len(text.split()) for text in texts]

    async def stats(self):
        return EngineStats(1, 2, 4, 100, 50, 10, requests_total=len(self.requests))

    async def close(self):
        self.alive = False


class FakeEmbedder:
    """Counts letters; reads at most 20 tokens (words). Remembers what it counted and what it was asked."""

    dimension, max_tokens, window_tokens, reads_hangul = 3, 20, 20, False

    def __init__(self, name: str = "fake", fingerprint: str = "f") -> None:
        self.name, self.fingerprint = name, fingerprint
        self.counted, self.asked = [], []

    def documents(self, texts):
        rows = np.array([[len(text), text.count("a"), 1] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def queries(self, texts):
        self.asked += texts
        return -self.documents(texts)

    def count_tokens(self, text):
        self.counted.append(len(text))
        return len(text.split())

    def spans(self, text):
        return [found.span() for found in re.finditer(r"\S+", text)]


class House:
    """The application and a synchronous way to call it."""

    def __init__(
        self,
        settings: Settings,
        engine: FakeEngine,
        retriever: Retriever | None,
        keys: Keys,
        *,
        kinds=(),
        preload=True,
        engine_options=(),
        **options,
    ) -> None:
        self.engine = engine
        self.loading: asyncio.Event | None = None  # waited for before an engine is there
        self.embedder = FakeEmbedder()
        self.embedders = EmbedderThread(lambda _: self.embedder, max_queue=settings.embedder.max_queue)
        facts = Facts("fake", "fake 10", n_ctx_train=4000, n_params=10, size_bytes=10)
        plans = {}
        for name in [*settings.models, *settings.assistants]:
            kind = dict(kinds).get(name, "text")
            file = Path(f"/secret/folder/{'fake' if kind == 'text' else name}.gguf")
            config = EngineConfig(file, **({"kind": kind, "n_ctx": 4000} | dict(engine_options)))
            plans[name] = Plan(name, config, CONTROL, facts, Footprint(10, 20, 30), preload=preload)
        retriever = retriever or Retriever(Path("/nonexistent"), self.embedders)
        fleet = Fleet(members(plans.values()), self._start, budget=Bytes(1000))
        asyncio.run(fleet.preload())
        roster = Roster(
            settings,
            plans=plans,
            fleet=fleet,
            retriever=retriever,
            embedder=settings.embedder.model,
        )
        self.service = Service(settings, roster, self.embedders, keys, Hosts(settings), **options)
        self.app = create_app(self.service)

    async def _start(self, _config) -> FakeEngine:
        if self.loading:
            await self.loading.wait()
        return self.engine

    def client(self, **options) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=InProcess(self.app), base_url=BASE_URL, **options)

    def call(self, method: str, path: str, **options) -> httpx.Response:
        async def once() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(once())

    def chat(self, text="Hi", **fields) -> httpx.Response:
        body = {"model": "fake", "messages": [{"role": "user", "content": text}]} | fields
        return self.call("POST", "/v1/chat/completions", json=body)

    def prompt(self) -> str:
        """The last prompt, its control tokens as ⟦ and ⟧."""
        marks = {256: "⟦", 257: "⟧"}
        tokens = self.engine.read[-1]
        text, plain = "", bytearray()
        for token in tokens:
            if token in marks:
                text += plain.decode() + marks[token]
                plain.clear()
            else:
                plain.append(token)
        return text + plain.decode()


@pytest.fixture
def build():
    """A function that builds a House from settings.

    `keys` are (name, key); `key_limits` are fields of [keys.NAME] by name; `kinds` those of models that
    write no text; `engine_options` fields of every EngineConfig; without `preload` none is there at first.
    """
    houses = []

    def make(
        *, keys=(), key_limits=None, retriever=None, clock=time.monotonic, kinds=None, preload=True,
        engine_options=(), **fields,
    ) -> House:  # fmt: skip
        named = {
            name: Key(key_sha256=sha256(dict(keys)[name].encode()).hexdigest(), **limits)
            for name, limits in (key_limits or {}).items()
        }
        models = {name: Model() for name in ("fake", *(kinds or ()))}
        fields = {"models": models, "keys": named} | fields
        settings = complete(Settings(**fields), "test")
        accepted = [accept(name, key) for name, key in dict(keys).items()]
        house = House(
            settings, FakeEngine(), retriever, Keys(accepted), clock=clock, kinds=kinds or (),
            preload=preload, engine_options=engine_options,
        )  # fmt: skip
        houses.append(house)
        return houses[-1]

    yield make
    for house in houses:
        asyncio.run(house.embedders.close())


@pytest.fixture
def make_engine():
    """The class, for tests that open a service themselves."""
    return FakeEngine


@pytest.fixture
def make_embedder():
    """The class, for tests that need one of their own."""
    return FakeEmbedder


@pytest.fixture
def house(build) -> House:
    """A server with one model, `fake`, and no key."""
    return build()


@pytest.fixture
def written(tmp_path):
    """A function that writes lq.toml and returns its path."""

    def write(text: str) -> Path:
        (tmp_path / "lq.toml").write_text(text)
        return tmp_path / "lq.toml"

    return write
