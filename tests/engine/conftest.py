"""One model for the whole session, and ways to run requests through a loop over it."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.client import Engine
from engine.llama import Context, Model
from engine.loop import Loop
from engine.request import Delta, Done, EngineConfig, EngineError, GenerationRequest, Sampling
from tests.engine.ggml_graph import MatmulProcess

GREEDY = Sampling(temperature=0)


@asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[Engine]:
    """An engine in a process of its own, until the block ends."""
    engine = await Engine.start(config)
    try:
        yield engine
    finally:
        await engine.close()


class Runner:
    """A loop over the real model; `run` gives each request's texts, tokens, log-probabilities and Done."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.tokens: dict[object, list[int]] = {}
        self.texts: dict[object, str] = {}
        self.logprobs: dict[object, list] = {}
        self.ends: dict[object, Done | EngineError] = {}

    def submit(self, id: object, prompt, sampling: Sampling = GREEDY, **options) -> None:
        self.tokens[id], self.texts[id], self.logprobs[id] = [], "", []
        self.loop.submit(id, GenerationRequest(prompt, sampling, **options))

    def step(self) -> None:
        for id, event in self.loop.step():
            if isinstance(event, Delta):
                self.texts[id] += event.text
                self.tokens[id] += event.tokens
                self.logprobs[id] += event.logprobs
            else:
                assert id not in self.ends, "one end a request"
                self.ends[id] = event

    def run(self) -> None:
        while not self.loop.idle:
            self.step()

    def write(self, prompt, sampling: Sampling = GREEDY, **options) -> tuple[str, Done]:
        """One request alone: its text and end."""
        id = object()
        self.submit(id, prompt, sampling, **options)
        self.run()
        end = self.ends[id]
        if isinstance(end, EngineError):
            raise end
        return self.texts[id], end


@pytest.fixture(scope="session")
def model(smollm2_gguf: Path) -> Iterator[Model]:
    with Model.open(smollm2_gguf) as model:
        yield model


@pytest.fixture
def make_runner(model: Model):
    """A function: slots -> a runner with an empty memory; everything is freed at the end of the test."""
    contexts: list[Context] = []
    loops: list[Loop] = []

    def make(*, n_parallel: int = 4, n_ctx: int = 512, n_batch: int = 64, **options) -> Runner:
        cells = n_ctx * n_parallel
        context = Context.open(
            model, n_ctx=cells, n_batch=n_batch, n_seq_max=n_parallel, n_outputs_max=n_parallel, n_threads=1
        )
        contexts.append(context)
        loops.append(Loop(model, context, n_ctx=n_ctx, n_parallel=n_parallel, **options))
        return Runner(loops[-1])

    yield make
    for loop in loops:
        loop.close()
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def shared_context(model: Model) -> Iterator[Context]:
    """Sixteen sequences of 256 cells, all tokens may have logits; with bf16 keys nothing depends on calls."""
    with Context.open(
        model, n_ctx=16 * 256, n_batch=128, n_seq_max=16, n_threads=1, type_k="bf16"
    ) as context:
        yield context


@pytest.fixture
def context(shared_context: Context) -> Context:
    """The shared context, empty."""
    shared_context.clear()
    return shared_context


@pytest.fixture
def make_loop(model: Model, context: Context) -> Iterator[Callable[..., Loop]]:
    """A function that makes a loop over the shared context, emptied; all are closed at the end."""
    loops: list[Loop] = []

    def make(*, n_ctx: int = 128, n_parallel: int = 4, max_queue: int | None = None) -> Loop:
        context.clear()
        loops.append(Loop(model, context, n_ctx=n_ctx, n_parallel=n_parallel, max_queue=max_queue))
        return loops[-1]

    yield make
    for loop in loops:
        loop.close()


class Answer:
    """What one request gave."""

    def __init__(self) -> None:
        self.deltas: list[Delta] = []
        self.done: Done | None = None
        self.error: EngineError | None = None

    def take(self, event: Delta | Done | EngineError) -> None:
        assert self.done is None, "something came after Done"
        assert self.error is None, "something came after an error"
        if isinstance(event, Delta):
            self.deltas.append(event)
        elif isinstance(event, Done):
            self.done = event
        else:
            self.error = event

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]

    @property
    def logprobs(self):
        return [detail for delta in self.deltas for detail in delta.logprobs]


@pytest.fixture(scope="session")
def drain() -> Callable[..., list[Answer]]:
    """A function: run the requests through a loop until it is idle; their answers in the same order."""

    def drain(loop: Loop, *requests: GenerationRequest) -> list[Answer]:
        answers = [Answer() for _ in requests]
        for index, request in enumerate(requests):
            loop.submit(index, request)
        while not loop.idle:
            for id, event in loop.step():
                answers[id].take(event)
        return answers

    return drain


@pytest.fixture(scope="module")
def our_matmul() -> Iterator[MatmulProcess]:
    """Weights times rows with our kernels, in a process of its own."""
    with MatmulProcess(with_kernel=True) as process:
        yield process


@pytest.fixture(scope="module")
def their_matmul() -> Iterator[MatmulProcess]:
    """The same by llama.cpp's own."""
    with MatmulProcess(with_kernel=False) as process:
        yield process
