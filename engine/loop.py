"""The owner of a context: schedule -> decode -> sample -> emit, one call at a time.

Synchronous and single-threaded; the worker process drives it for the server, quantize/ drives it in process.
What goes wrong with one sequence fails that sequence and no other.
"""

import time
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from engine.llama import Context, DecodeFailed, Model
from engine.request import (
    ContextOverflow,
    Delta,
    Done,
    EngineError,
    EngineStats,
    Event,
    FinishReason,
    GenerationRequest,
    InvalidRequest,
    QueueFull,
    TokenLogprob,
)
from engine.sampling import Sampler, logprobs
from engine.scheduler import Chunk, Scheduler, Sequence
from engine.text import Decoder, StopStrings

Output = tuple[Hashable, Event | EngineError]


@dataclass(eq=False, slots=True)
class _Writing:
    """What belongs to one request beside its scheduling."""

    request: GenerationRequest
    sequence: Sequence
    sampler: Sampler
    stops: StopStrings
    decoder: Decoder = field(default_factory=Decoder)
    n_completion: int = 0
    admitted_s: float = 0.0
    first_s: float = 0.0


@dataclass(slots=True)
class _Counters:
    requests_total: int = 0
    cancelled_total: int = 0
    failed_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    completion_tokens_total: int = 0
    decode_steps_total: int = 0
    busy_s: float = 0.0


class Loop:
    """Requests in by `submit`, outputs out of `step`, until `idle`."""

    def __init__(
        self, model: Model, context: Context, *, n_ctx: int, n_parallel: int, max_queue: int | None = None
    ) -> None:
        self.model = model
        self.context = context
        self.n_ctx = n_ctx
        self.max_queue = max_queue
        self.counters = _Counters()
        self.scheduler = Scheduler(
            n_slots=n_parallel,
            n_batch=context.n_batch,
            share_prefixes=context.can_share_prefixes,
            n_window=context.n_window,
            n_copy_min=context.n_copy_min,
        )
        self._writing: dict[Hashable, _Writing] = {}

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def only_writes(self) -> bool:
        """Whether the next step has no prompt to compute: one token for each that runs."""
        return self.scheduler.only_writes

    def submit(self, id: Hashable, request: GenerationRequest) -> None:
        """Queue a request. Raises InvalidRequest, ContextOverflow or QueueFull; nothing is queued then."""
        request.validate()
        prompt = self._tokens(request)
        room = self.n_ctx - len(prompt)
        if room < 1:
            raise ContextOverflow(len(prompt), self.n_ctx)
        if self.max_queue is not None and self.scheduler.n_waiting_with(1) > self.max_queue:
            raise QueueFull(len(self.scheduler.waiting), retry_after_s=self._wait_s())
        sampler = Sampler(self.context, request.sampling, prompt=prompt, ignore_eos=request.ignore_eos)
        sequence = Sequence(id, prompt, min(room, request.max_tokens or room))
        self._writing[id] = _Writing(request, sequence, sampler, StopStrings(request.stop))
        self.scheduler.add(sequence)
        self.counters.requests_total += 1

    def cancel(self, id: Hashable) -> None:
        """End a request at once, before the next call; an unknown or finished one is left alone."""
        writing = self._writing.get(id)
        if writing is not None:
            self.counters.cancelled_total += 1
            self._end(writing)

    def step(self) -> list[Output]:
        """Admit, decode once, sample; everything that this gave, in slot order."""
        started = time.perf_counter()
        for admission in self.scheduler.admit():
            self._place(admission.sequence, admission.source, admission.length, started)
        plan = self.scheduler.plan()
        if not plan:
            return []
        outputs = self._decode(plan)
        self.counters.decode_steps_total += 1
        self.counters.busy_s += time.perf_counter() - started
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot; counters since this loop was made."""
        running = self.scheduler.running
        used = sum(sequence.n_computed for sequence in running)
        held = sum(len(slot.tokens) for slot in self.scheduler.slots)
        counters = {name: getattr(self.counters, name) for name in _Counters.__dataclass_fields__}
        return EngineStats(
            running=len(running),
            waiting=len(self.scheduler.waiting),
            n_slots=len(self.scheduler.slots),
            kv_cells_total=self.context.n_ctx,
            kv_cells_used=used,
            kv_cells_cached=held - used,
            **counters,
        )

    def close(self) -> None:
        """Free the samplers of requests that are still there."""
        for writing in list(self._writing.values()):
            self._end(writing)

    def _tokens(self, request: GenerationRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, str):
            tokens = self.model.tokenize(
                request.prompt, add_special=request.add_special, parse_special=request.parse_special
            )
            if not tokens:
                raise InvalidRequest("the prompt is empty: give at least one character", field="prompt")
            return tuple(tokens)
        self.check_tokens(request.prompt, field="prompt")
        return tuple(request.prompt)

    def check_tokens(self, tokens: Iterable[int], *, field: str) -> None:
        """Raise InvalidRequest for a token that the vocabulary does not have; native code would abort."""
        last = self.model.n_vocab - 1
        for token in tokens:
            if not 0 <= token <= last:
                raise InvalidRequest(f"{field} holds {token}; this vocabulary ends at {last}", field=field)

    def _wait_s(self) -> float:
        """A guess at when a place is free: the time of work that a finished request took, on average."""
        finished = max(1, self.counters.requests_total - len(self._writing))
        return min(60.0, max(1.0, self.counters.busy_s / finished))

    def _place(self, sequence: Sequence, source: int, length: int, now_s: float) -> None:
        """Bring the KV memory of a slot to what the scheduler decided."""
        assert sequence.slot is not None
        if source != sequence.slot:
            self.context.copy(source, sequence.slot, length)
        else:
            self.context.remove(sequence.slot, length)
        writing = self._writing[sequence.id]
        writing.admitted_s = writing.admitted_s or now_s

    def _decode(self, plan: list[Chunk]) -> list[Output]:
        batch = self.context.batch
        batch.clear()
        last = [self._fill(chunk) for chunk in plan]
        try:
            self.context.decode()
        except DecodeFailed as error:
            return self._isolate(plan, error)
        outputs: list[Output] = []
        for chunk, index in zip(plan, last, strict=True):
            self.scheduler.computed(chunk)
            if chunk.samples:
                outputs += self._advance(self._writing[chunk.sequence.id], index)
        return outputs

    def _fill(self, chunk: Chunk) -> int:
        """Put a chunk into the batch; the index of its last token."""
        assert chunk.sequence.slot is not None
        return self.context.batch.extend(
            chunk.tokens, start=chunk.start, sequence=chunk.sequence.slot, output=chunk.samples
        )

    def _isolate(self, plan: list[Chunk], error: DecodeFailed) -> list[Output]:
        """A call failed: run its parts one by one, so that only the guilty sequences fail."""
        if len(plan) == 1:
            writing = self._writing[plan[0].sequence.id]
            self._fail(writing)
            return [(writing.sequence.id, error)]
        outputs: list[Output] = []
        for chunk in plan:
            assert chunk.sequence.slot is not None
            self.context.remove(chunk.sequence.slot, chunk.start)  # what the failed call may have left
        for chunk in plan:
            outputs += self._decode([chunk])
        return outputs

    def _advance(self, writing: _Writing, index: int) -> list[Output]:
        """Sample one token of a sequence and say what became of it."""
        sequence = writing.sequence
        try:
            token = writing.sampler.sample(index)
            detail = self._logprobs(writing, index, token)
        except EngineError as error:
            self._fail(writing)
            return [(sequence.id, error)]
        if writing.n_completion == 0:
            writing.first_s = time.perf_counter()
        writing.n_completion += 1
        goes_on = self.scheduler.wrote(sequence, token)
        if self.model.is_eog(token):
            return self._finish(writing, "stop", stop_token=token)
        text = writing.stops.step(writing.decoder.step(self.model.written(token)))
        delta = (sequence.id, Delta(text, (token,), detail))
        if writing.stops.found is not None:
            return [delta, *self._finish(writing, "stop")]
        return [delta] if goes_on else [delta, *self._finish(writing, "length")]

    def _logprobs(self, writing: _Writing, index: int, token: int) -> tuple[TokenLogprob, ...]:
        wanted = writing.request.logprobs
        return () if wanted is None else (logprobs(self.context, index, token, n_top=wanted),)

    def _finish(
        self, writing: _Writing, reason: FinishReason, *, stop_token: int | None = None
    ) -> list[Output]:
        """The last outputs of a request: text that was held back, and Done."""
        sequence, now = writing.sequence, time.perf_counter()
        held = writing.stops.flush()
        done = Done(
            reason,
            n_prompt_tokens=len(sequence.prompt),
            n_completion_tokens=writing.n_completion,
            n_cached_tokens=sequence.n_cached,
            stop_string=writing.stops.found,
            stop_token=stop_token,
            prefill_s=writing.first_s - writing.admitted_s,
            decode_s=now - writing.first_s,
        )
        self._end(writing)
        tail: list[Output] = [(sequence.id, Delta(held, ()))] if held else []
        return [*tail, (sequence.id, done)]

    def _fail(self, writing: _Writing) -> None:
        self.counters.failed_total += 1
        slot = writing.sequence.slot
        self._end(writing, forget=True)
        if slot is not None:
            self.context.remove(slot)

    def _end(self, writing: _Writing, *, forget: bool = False) -> None:
        """Free a request's slot and samplers; the slot keeps its computed tokens for later prefixes."""
        sequence = writing.sequence
        self.counters.prompt_tokens_total += len(sequence.prompt)
        self.counters.cached_tokens_total += sequence.n_cached
        self.counters.completion_tokens_total += writing.n_completion
        del self._writing[sequence.id]
        self.scheduler.release(sequence, forget=forget)
        writing.sampler.close()
