"""The owner of a context: schedule -> decode -> choose -> emit, one call at a time.

Synchronous and single-threaded; the worker process drives it for the server, quantize/ drives it in process.
What goes wrong with one sequence fails that sequence and no other.
"""

import hashlib
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from collections.abc import Sequence as Items
from functools import partial
from typing import Any

import numpy as np

from engine.bounds import tokens_within
from engine.defects import told
from engine.drafter import Drafter
from engine.figures import Figures
from engine.guessing import Guessing
from engine.hands import Hands, Scaled
from engine.holdings import Costs
from engine.llama import Adapter, Context, DecodeFailed, Model
from engine.luck import GUESSES_A_SEQUENCE
from engine.pace import Pace
from engine.request import (
    ContextOverflow,
    EngineError,
    Event,
    GenerationRequest,
    InvalidRequest,
    QueueFull,
)
from engine.sampling import Sampler
from engine.scheduler import Scheduler
from engine.sequence import Action, Begin, Chunk, Plan, Sequence
from engine.states import States
from engine.stats import EngineStats
from engine.text import StopStrings
from engine.turns import Limits
from engine.writing import Progress, Writing

Output = tuple[Hashable, Event | EngineError]


class Loop:
    """Requests in by `submit`, outputs out of `step`, until `idle`."""

    def __init__(
        self,
        model: Model,
        context: Context,
        *,
        n_ctx: int,
        n_parallel: int,
        max_queue: int | None = None,
        pace: Pace | None = None,
        guesses: int = 0,
        drafter: Drafter | None = None,
        ram_bytes: int = 0,
        disk_bytes: int = 0,
        states: States | None = None,
        token_bytes: int = 1,
        applied: Items[Scaled] = (),
        adapters: Mapping[str, Adapter] | None = None,
    ) -> None:
        """`guesses`: logits that a call may have beside one a sequence, for tokens that are guessed ahead.

        `applied`: adapters that every request uses; `adapters`: those that a request may name.
        """
        self.model = model
        self.context = context
        self.n_ctx = n_ctx
        self.max_queue = max_queue
        self.figures = Figures()
        self.pace = pace or Pace(in_streams=not context.unified)
        self.guessing = Guessing(
            self.pace, most=guesses if context.can_share_prefixes else 0, drafter=drafter
        )
        self.hands = Hands(context, states or States(), applied=applied, adapters=adapters)
        self.scheduler = Scheduler(
            n_slots=n_parallel,
            n_batch=context.n_batch,
            n_cells=context.n_ctx if context.unified else None,
            share_prefixes=context.can_share_prefixes,
            n_window=context.n_window,
            costs=Costs() if context.unified else Costs(copy=16, copied=0.01),
            ram_bytes=ram_bytes,
            disk_bytes=disk_bytes,
            token_bytes=token_bytes,
        )
        #: Told the ids of the requests that are worked on next, before it is done.
        self.note: Callable[[Iterable[Any]], None] = lambda _: None
        self.gets_on: Callable[[], None] = lambda: None  # told while it closes
        self._writing: dict[Hashable, Writing] = {}
        self._act(self.scheduler.adopt(self.hands.states.found()))

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
        self._check_adapters(request)
        prompt = self._tokens(request)
        room = self.n_ctx - len(prompt)
        if self.max_queue is not None and self.scheduler.is_full_for(request.tenant, self.max_queue):
            raise QueueFull(len(self.scheduler.queue), retry_after_s=self._wait_s())
        sampler = Sampler(self.context, request.sampling, prompt=prompt, ignore_eos=request.ignore_eos)
        sequence = Sequence(
            id,
            prompt,
            min(room, request.max_tokens or room),
            tenant=request.tenant,
            namespace=_namespace(request),
            adapters=request.adapters,
        )
        self._writing[id] = Writing(request, sequence, sampler, StopStrings(request.stop))
        self.scheduler.add(sequence)
        self.figures.counters.requests_total += 1

    def cancel(self, id: Hashable) -> None:
        """End a request at once, before the next call; an unknown or finished one is left alone."""
        writing = self._writing.get(id)
        if writing is not None:
            self.figures.counters.cancelled_total += 1
            self._end(writing)

    def step(self) -> list[Output]:
        """Admit, decode once, choose; everything that this gave, in slot order."""
        started = time.perf_counter()
        actions = self.scheduler.admit()
        self.note(each.id for each in self.scheduler.running)
        self._act(actions)
        self._admitted(actions, started)
        running = self.scheduler.running
        writing = [each for each in running if each.is_writing]
        # Beside prompts a call is long as it is, and what guesses cost could not be told apart.
        drafts = self._guess(self._next_of(writing)) if len(writing) == len(running) else None
        limits = Limits(self.pace.n_prompt(len(writing)), self.pace.n_brief())
        plan = self.scheduler.plan(limits=limits, drafts=drafts)
        self._act(plan.actions)
        if not plan.chunks:
            return []
        self.hands.use(plan.adapters)
        called = time.perf_counter()
        outputs = self._decode(plan.chunks)
        now = time.perf_counter()
        self._learn(plan, now - called)  # what was brought or guessed before it is no part of a call's time
        self.figures.counters.decode_steps_total += 1
        self.figures.counters.busy_s += now - started
        return outputs

    def stats(self) -> EngineStats:
        """A snapshot; counters since this loop was made."""
        now = time.perf_counter()
        began = ((id, writing.admitted_s) for id, writing in self._writing.items())
        ages_s = {id: now - admitted_s for id, admitted_s in began if admitted_s}
        return self.figures.snapshot(self.scheduler, self.context, self.guessing, ages_s)

    def rest(self) -> bool:
        """Write to disk one thing that a crash would lose, while nobody asks; whether there may be more."""
        actions = self.scheduler.back_up()
        self._act(actions)
        return bool(actions)

    def close(self) -> None:
        """Free the samplers of requests that are still there; prefixes go to disk within its budget."""
        for writing in list(self._writing.values()):
            self._end(writing)
        for action in self.scheduler.retire():
            self._act([action])
            self.gets_on()  # for which the client waits

    def check_tokens(self, tokens: Iterable[int], *, field: str) -> None:
        """Raise InvalidRequest for a token that the vocabulary does not have; native code would abort."""
        last = self.model.n_vocab - 1
        for token in tokens:
            if not 0 <= token <= last:
                raise InvalidRequest(f"{field} holds {token}; this vocabulary ends at {last}", field=field)

    def _admitted(self, actions: Iterable[Action], now_s: float) -> None:
        """Note when requests began to be computed."""
        for action in actions:
            if isinstance(action, Begin) and (writing := self._writing.get(action.sequence.id)) is not None:
                writing.admitted_s = writing.admitted_s or now_s

    # Requests

    def _tokens(self, request: GenerationRequest) -> tuple[int, ...]:
        if isinstance(request.prompt, str):
            how = {"add_special": request.add_special, "parse_special": request.parse_special}
            tokens = tokens_within(partial(self.model.tokenize, **how), request.prompt, self.n_ctx)
            if not tokens:
                raise InvalidRequest("the prompt is empty: give at least one character", field="prompt")
            return tuple(tokens)
        self.check_tokens(request.prompt, field="prompt")
        if len(request.prompt) >= self.n_ctx:
            raise ContextOverflow(len(request.prompt), self.n_ctx)
        return tuple(request.prompt)

    def _check_adapters(self, request: GenerationRequest) -> None:
        for name, _ in request.adapters:
            if name not in self.hands.adapters:
                known = ", ".join(self.hands.adapters) or "none"
                raise InvalidRequest(f"adapter {name!r} is not loaded; there are: {known}", field="adapters")

    def _wait_s(self) -> float:
        """A guess at when a place is free: the time of work that a finished request took, on average."""
        counters = self.figures.counters
        finished = max(1, counters.requests_total - len(self._writing))
        return min(60.0, max(1.0, counters.busy_s / finished))

    def _act(self, actions: Iterable[Action]) -> None:
        """Bring native memory to what the scheduler decided; what could not be brought is computed."""
        for what in self.hands.act(actions):
            self._act(self.scheduler.lost(what))

    # A call

    def _next_of(self, sequences: list[Sequence]) -> list[Sequence]:
        """Those whose adapters are used in the next call: others' guesses would be made in vain."""
        adapters = self.scheduler.next_adapters
        return [each for each in sequences if each.adapters == adapters]

    def _guess(self, writing: list[Sequence]) -> dict[Sequence, list[int]]:
        """Tokens worth checking along with each writing sequence's own."""
        gives_way = self.scheduler.turns.is_over_share
        limits = {
            each: 0 if gives_way(each) else min(GUESSES_A_SEQUENCE, each.n_behind_next) for each in writing
        }
        return self.guessing.choose(limits)

    def _learn(self, plan: Plan, seconds: float) -> None:
        n_writing = sum(chunk.is_writing for chunk in plan.chunks)
        n_guesses = sum(chunk.n_draft for chunk in plan.chunks)
        n_prompt = sum(len(chunk.tokens) for chunk in plan.chunks) - n_writing - n_guesses
        even = len({chunk.n_draft for chunk in plan.chunks}) == 1
        if not n_prompt:
            self.figures.guessing = n_guesses > 0
            self.guessing.called(n_writing, n_guesses=n_guesses, seconds=seconds)
        self.pace.learn(
            n_writing=n_writing, n_prompt=n_prompt, seconds=seconds, n_guesses=n_guesses, even=even
        )

    def _decode(self, chunks: list[Chunk]) -> list[Output]:
        self.note(chunk.sequence.id for chunk in chunks)
        batch = self.context.batch
        batch.clear()
        last = [self._fill(chunk) for chunk in chunks]
        try:
            self.context.decode()
        except DecodeFailed as error:
            return self._isolate(chunks, error)
        outputs: list[Output] = []
        for chunk, index in zip(chunks, last, strict=True):
            if chunk.samples:
                outputs += self._advance(self._writing[chunk.sequence.id], chunk, index)
            else:
                self.scheduler.computed(chunk)
        return outputs

    def _fill(self, chunk: Chunk) -> int:
        """Put a chunk into the batch; the index of its last token."""
        slot = chunk.sequence.slot
        assert slot is not None
        batch = self.context.batch
        last = batch.extend(chunk.tokens, start=chunk.start, sequence=slot, output=chunk.samples)
        if chunk.n_draft:
            batch.want(np.arange(last - chunk.n_draft, last))
        return last

    def _isolate(self, chunks: list[Chunk], error: DecodeFailed) -> list[Output]:
        """A call failed: run its parts one by one, so that only the guilty sequences fail."""
        if len(chunks) == 1:
            writing = self._writing[chunks[0].sequence.id]
            self._fail(writing)
            return [(writing.sequence.id, error)]
        outputs: list[Output] = []
        for chunk in chunks:
            assert chunk.sequence.slot is not None
            self.context.remove(chunk.sequence.slot, chunk.start)  # what the failed call may have left
        for chunk in chunks:
            outputs += self._decode([chunk])
        return outputs

    def _advance(self, writing: Writing, chunk: Chunk, index: int) -> list[Output]:
        """Choose the tokens that a call allows a sequence, and say what became of it."""
        sequence, before_s = writing.sequence, writing.last_s
        self.note((sequence.id,))  # a grammar that makes llama.cpp abort is this one's alone
        try:
            progress = writing.choose(self.context, chunk, index)
        except Exception as error:  # a defect that one request's grammar or stops bring out must not end all
            self._fail(writing)
            return [(sequence.id, told(error))]
        if before_s:
            self.figures.waited(writing.last_s - before_s)
        self._keep(chunk, progress)
        outputs: list[Output] = []
        if progress.delta is not None:
            outputs.append((sequence.id, progress.delta))
        if progress.ending is not None:
            held, done = writing.done(progress.ending)
            self._end(writing)
            outputs += [(sequence.id, held)] if held is not None else []
            outputs.append((sequence.id, done))
        return outputs

    def _keep(self, chunk: Chunk, progress: Progress) -> None:
        """Record what was computed and written; forget the cells of guesses that were wrong."""
        sequence = chunk.sequence
        n_kept = len(chunk.tokens) - chunk.n_draft + progress.n_right
        self.scheduler.computed(chunk, n_kept)
        for token in progress.tokens:
            self.scheduler.wrote(sequence, token)
        if chunk.n_draft:
            assert sequence.slot is not None
            self.guessing.learn(sequence, n_guesses=chunk.n_draft, n_right=progress.n_right)
            if n_kept < len(chunk.tokens):
                self.context.remove(sequence.slot, chunk.start + n_kept)

    def _fail(self, writing: Writing) -> None:
        self.figures.counters.failed_total += 1
        self._end(writing, forget=True)

    def _end(self, writing: Writing, *, forget: bool = False) -> None:
        """Free a request's slot and samplers; the slot keeps its computed tokens for later prefixes."""
        sequence = writing.sequence
        self.figures.counters.ended(sequence)
        del self._writing[sequence.id]
        self.guessing.forget(sequence)
        self._act(self.scheduler.release(sequence, forget=forget))
        writing.close()


def _namespace(request: GenerationRequest) -> str:
    """Requests that may share prefixes have the same: of one salt and one set of adapters.

    Hashed, since it is also in the files of states on disk.
    """
    if not request.cache_salt and not request.adapters:
        return ""
    return hashlib.blake2b(repr((request.cache_salt, request.adapters)).encode(), digest_size=16).hexdigest()
