"""The owner of a context whose calls give one result a sequence: embeddings, or scores of a reranker.

The same shape as Loop: `submit`, `step`, `cancel`, `idle`, `stats`, `close`. Waiting requests give their
texts in turn, one each, until a call is full, so that a request of thousands lets a short one through. Whose
turn it is says the fair queue (fairness.py), in which a request stands again and again, once for each text.
"""

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from engine.bounds import CHARACTERS_PER_TOKEN, is_too_long
from engine.fairness import FairQueue
from engine.figures import Counters
from engine.llama import Context, DecodeFailed, Model
from engine.pairs import Pairs
from engine.pooling import goes_on, normalised, open_context, pool
from engine.request import (
    EMBEDDING_POOLINGS,
    EngineConfig,
    EngineError,
    InputTooLong,
    InvalidRequest,
    Kind,
    ModelLoadFailed,
    Pooled,
    PooledRequest,
    Pooling,
    QueueFull,
    Read,
    Tenant,
)
from engine.stats import EngineStats

Output = tuple[Hashable, Read | Pooled | EngineError]


class ResultIsNoNumber(EngineError):
    """The model computed NaN or infinity."""

    def __init__(self) -> None:
        super().__init__("the model gave values that are no numbers: its file may be damaged")


@dataclass(eq=False, slots=True)
class _Job:
    """A request, what it has so far, and its next text once that is tokenised."""

    id: Hashable
    request: PooledRequest
    values: np.ndarray  # (inputs, width)
    n_taken: int = 0
    n_computed: int = 0
    n_tokens: int = 0
    upcoming: list[int] = field(default_factory=list)

    @property
    def tenant(self) -> Tenant:
        return self.request.tenant

    @property
    def has_more(self) -> bool:
        """Whether it waits in the queue for its next text's turn."""
        return self.n_taken < len(self.request.inputs)


@dataclass(frozen=True, slots=True)
class _Text:
    """One input of a job in the next call."""

    job: _Job
    index: int
    tokens: list[int]


class PooledLoop:
    """Requests in by `submit`, outputs out of `step`, until `idle`."""

    only_writes = False  # its outputs are ends of requests, which nobody holds back

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        kind: Kind,
        pooling: Pooling,
        n_ctx: int,
        n_tokens: int = 512,
        n_parallel: int = 64,
        max_queue: int | None = None,
    ) -> None:
        """`n_ctx`: tokens of one text at most; `n_tokens` and `n_parallel` (texts): of one call."""
        self.model = model
        self.context = context
        self.kind = kind
        self.pooling: Pooling = pooling
        self.n_ctx = n_ctx
        self.n_tokens = n_tokens
        self.n_parallel = n_parallel
        self.max_queue = max_queue
        self.counters = Counters()
        #: Told the ids of the requests that are worked on next, before it is done.
        self.note: Callable[[Iterable[Any]], None] = lambda _: None
        self._goes_on = goes_on(context, pooling)
        self._pairs = Pairs(model) if kind == "rerank" else None
        self._width = 1 if kind == "rerank" else model.n_pooled
        self._jobs: dict[Hashable, _Job] = {}
        self._queue: FairQueue[_Job] = FairQueue()  # jobs with texts to take; what runs are texts of a call

    @property
    def idle(self) -> bool:
        return not self._jobs

    def submit(self, id: Hashable, request: PooledRequest) -> None:
        """Queue a request. Raises InvalidRequest or QueueFull; nothing is queued then."""
        request.validate()
        if self.kind == "rerank" and request.query is None:
            raise InvalidRequest("this model ranks documents: give a query", field="query")
        if self.kind == "embedding" and request.query is not None:
            raise InvalidRequest("this model embeds texts and ranks none: leave out the query", field="query")
        if self._is_full_for(request.tenant):
            raise QueueFull(len(self._jobs), retry_after_s=self._wait_s())
        job = _Job(id, request, np.empty((len(request.inputs), self._width), np.float32))
        self._jobs[id] = job
        self._queue.add(job)
        self.counters.requests_total += 1

    def _is_full_for(self, tenant: Tenant) -> bool:
        n_waiting = len(self._queue) + 1 - self.n_parallel  # the others are in the next call
        return self.max_queue is not None and self._queue.is_full_for(
            tenant, self.max_queue, n_waiting=n_waiting
        )

    def cancel(self, id: Hashable) -> None:
        """End a request at once, before the next call; an unknown or finished one is left alone."""
        if id in self._jobs:
            self.counters.cancelled_total += 1
            self._end(self._jobs[id])

    def step(self) -> list[Output]:
        """Fill a call with texts in turn and compute it: the requests that this ended, and of those that go
        on what was read."""
        if not self._jobs:
            return []
        started = time.perf_counter()
        outputs: list[Output] = []
        self._queue.called()
        texts = self._take(outputs)
        if texts:
            outputs += self._compute(texts)
            outputs += self._read(texts)
        for text in texts:
            self._queue.ended(text.job)
        self.counters.busy_s += time.perf_counter() - started
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot; counters since this loop was made."""
        n_cells = self.context.n_ctx if self.context.memory else 0
        begun = sum(job.n_taken > 0 for job in self._jobs.values())
        waiting = Counter(job.tenant.priority for job in self._jobs.values() if not job.n_taken)
        counted = {item.name: getattr(self.counters, item.name) for item in fields(Counters)}
        return EngineStats(
            running=begun,
            waiting=len(self._jobs) - begun,
            waiting_by_priority=tuple(sorted(waiting.items(), reverse=True)),
            n_slots=self.n_parallel,
            kv_cells_total=n_cells,
            kv_cells_used=0,  # between two calls none is
            kv_cells_cached=0,
            kv_cells_free=n_cells,
            **counted,
        )

    def rest(self) -> bool:
        """Nothing is left to do while nobody asks."""
        return False

    def close(self) -> None:
        """Forget the requests that are still there."""
        for job in list(self._jobs.values()):
            self._end(job)

    def check_tokens(self, tokens: Iterable[int], *, field: str) -> None:
        """Raise InvalidRequest for a token that the vocabulary does not have; native code would abort."""
        last = self.model.n_vocab - 1
        for token in tokens:
            if not 0 <= token <= last:
                raise InvalidRequest(f"{field} holds {token}; this vocabulary ends at {last}", field=field)

    # Filling a call

    def _take(self, outputs: list[Output]) -> list[_Text]:
        """The texts of the next call; requests whose next text cannot be read end in `outputs`."""
        texts: list[_Text] = []
        n_tokens = 0
        while len(texts) < self.n_parallel and (ready := self._queue.ready()):
            job = ready[0]
            self.note((job.id,))
            try:
                job.upcoming = job.upcoming or self._tokens(job)
            except EngineError as error:
                outputs.append(self._fail(job, error))
                n_tokens -= sum(self._put_back(text) for text in texts if text.job is job)
                texts = [text for text in texts if text.job is not job]
                continue
            if texts and n_tokens + len(job.upcoming) > self.n_tokens:
                break
            n_tokens += len(job.upcoming)
            texts.append(self._next_text(job))
        return texts

    def _next_text(self, job: _Job) -> _Text:
        """Take a job's upcoming text; with more of them it waits again, behind others of its tenant."""
        text = _Text(job, job.n_taken, job.upcoming)
        self._queue.started(job)
        self._queue.charge(job, len(text.tokens))
        job.n_taken, job.upcoming = job.n_taken + 1, []
        if job.has_more:
            self._queue.add(job)
        return text

    def _put_back(self, text: _Text) -> int:
        """A text that was taken is not computed after all; its tokens."""
        self._queue.charge(text.job, -len(text.tokens))
        self._queue.ended(text.job)
        return len(text.tokens)

    def _tokens(self, job: _Job) -> list[int]:
        """The next text of a job. Raises InputTooLong or InvalidRequest."""
        request, index = job.request, job.n_taken
        text = request.inputs[index]
        n_characters = len(text) + len(request.query or "")
        with_query = "" if request.query is None else " with the query"
        if is_too_long(n_characters, self.n_ctx):
            most = f"{self.n_ctx} tokens, never more than {CHARACTERS_PER_TOKEN * self.n_ctx} characters"
            raise InputTooLong(index, f"{n_characters} characters{with_query}", most)
        if self._pairs is not None and request.query is not None:
            tokens = self._pairs.tokens(request.query, text)
        else:
            tokens = self.model.tokenize(text)
        if not tokens:
            raise InvalidRequest(f"input {index} has no tokens: give more than white space", field="input")
        if len(tokens) > self.n_ctx:
            raise InputTooLong(index, f"{len(tokens)} tokens{with_query}", str(self.n_ctx))
        return tokens

    # A call

    def _compute(self, texts: list[_Text]) -> list[Output]:
        self.note({text.job.id for text in texts})
        try:
            rows = pool(self.context, [text.tokens for text in texts], self._width, goes_on=self._goes_on)
        except DecodeFailed as error:
            if len(texts) == 1:
                return [self._fail(texts[0].job, error)] if texts[0].job.id in self._jobs else []
            return [output for text in texts for output in self._compute([text])]
        self.counters.decode_steps_total += 1
        outputs: list[Output] = []
        for text, row in zip(texts, rows, strict=True):
            if text.job.id in self._jobs:  # else another text of its request failed
                outputs += self._keep(text, row)
        return outputs

    def _read(self, texts: list[_Text]) -> list[Output]:
        """What this call read for requests that go on."""
        counts: dict[_Job, int] = {}
        for text in texts:
            if text.job.id in self._jobs:
                counts[text.job] = counts.get(text.job, 0) + len(text.tokens)
        return [(job.id, Read(n_tokens)) for job, n_tokens in counts.items()]

    def _keep(self, text: _Text, row: np.ndarray) -> list[Output]:
        job = text.job
        if not np.isfinite(row).all():
            return [self._fail(job, ResultIsNoNumber())]
        job.values[text.index] = row if self.kind == "rerank" else normalised(row)
        job.n_computed += 1
        job.n_tokens += len(text.tokens)
        if job.n_computed < len(job.request.inputs):
            return []
        self._end(job)
        values = job.values[:, 0] if self.kind == "rerank" else job.values
        return [(job.id, Pooled(values, job.n_tokens))]

    def _fail(self, job: _Job, error: EngineError) -> Output:
        self.counters.failed_total += 1
        self._end(job)
        return job.id, error

    def _end(self, job: _Job) -> None:
        self.counters.prompt_tokens_total += job.n_tokens
        del self._jobs[job.id]
        if job.has_more:
            self._queue.remove(job)

    def _wait_s(self) -> float:
        """A guess at when a place is free: the time of work that a finished request took, on average."""
        finished = max(1, self.counters.requests_total - len(self._jobs))
        return min(60.0, max(1.0, self.counters.busy_s / finished))


def open_loop(model: Model, config: EngineConfig, stack: ExitStack) -> PooledLoop:
    """A loop over a model that was loaded, freed when `stack` closes. Raises ModelLoadFailed."""
    pooling = check(model, config)
    n_ctx = min(config.n_ctx, model.n_ctx_train)  # llama.cpp aborts at positions that BERT was not trained on
    context = stack.enter_context(open_context(model, config, pooling, n_ctx))
    loop = PooledLoop(
        model,
        context,
        kind=config.kind,
        pooling=pooling,
        n_ctx=n_ctx,
        n_tokens=config.n_batch,
        n_parallel=config.n_parallel,
        max_queue=config.max_queue,
    )
    stack.callback(loop.close)
    warm_up(loop)
    return loop


def check(model: Model, config: EngineConfig) -> Pooling:
    """The pooling to use. Raises ModelLoadFailed for a file that cannot be used as `config.kind` says."""
    place = config.model_path
    if not model.has_vocabulary:
        raise ModelLoadFailed(f"{place}: has no tokenizer; convert the model with its tokenizer")
    if model.has_encoder:
        raise ModelLoadFailed(f"{place}: {model.description} has an encoder like T5's, which is not served")
    if config.kind == "rerank":
        if model.pooling != "rank":
            raise ModelLoadFailed(f"{place}: {model.description} ranks nothing: it has no pooling_type 4")
        return "rank"
    if model.pooling == "rank":
        raise ModelLoadFailed(f"{place}: {model.description} ranks documents and embeds none")
    pooling = config.pooling or model.pooling
    if pooling is None:
        raise ModelLoadFailed(
            f"{place}: {model.description} does not say how its tokens become one embedding: set pooling to "
            f"{', '.join(EMBEDDING_POOLINGS)}, as the model's authors say"
        )
    return pooling


def warm_up(loop: PooledLoop) -> None:
    """One text through tokenizer and model: what makes llama.cpp abort does so while the file is named."""
    request = PooledRequest(("a",), query="a" if loop.kind == "rerank" else None)
    loop.submit(None, request)
    for _, output in loop.step():
        if isinstance(output, EngineError):
            raise ModelLoadFailed(f"{loop.model.path}: {output}")
    loop.counters = Counters()
