"""Let the model write conversations: the user's turn from the open template, then the answer to it.

Owns who is asked next, the seeds, the temperatures and what is dropped. Text comes from a `Writer` (the
engine's loop); nothing here knows llama.cpp or GGUF.
"""

import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from engine.request import Delta, Done, EngineError, Event, GenerationRequest, Sampling
from quantize.calibration.conversation import Conversation, Journal, Role, Span
from quantize.calibration.filters import Seen, fault
from quantize.frame import CannotConverse, Frame, NothingToBeginFrom

Purpose = Literal["calibration", "evaluation", "recovery"]

#: A 50/50 mix of 0.5 and 1.5 made better calibration text than 0.8 (Williams et al., NAACL 2025). Questions
#: are asked at 1.0 or more, since at 0.5 a small model asks the same ones again.
TEMPERATURES = (0.5, 1.5)
MIN_QUESTION_TEMPERATURE = 1.0
MIN_P = 0.05

#: Of so many pieces in a row the last two, one a temperature, are plain text where that is asked for. It is
#: written hot: what is rounded by it loses least on text that no model wrote (docs/log.md).
PLAIN_PERIOD = 4
PLAIN_TEMPERATURES = (1.0, 2.0)
PLAIN_MIN_P = 0.02

#: Give up when this many in a row were dropped.
MAX_DROPPED = 200

Progress = Callable[[int, int], None]  # tokens kept, tokens wanted


class Writer(Protocol):
    """What is needed of engine.loop.Loop."""

    def submit(self, id: Hashable, request: GenerationRequest) -> None: ...
    def step(self) -> Sequence[tuple[Hashable, Event | EngineError]]: ...


class NoUsableText(CannotConverse):
    """The model writes nothing that the filters let through."""

    def __init__(self, reasons: dict[str, int]) -> None:
        told = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
        super().__init__(f"{MAX_DROPPED} self-written conversations in a row were dropped ({told})")


@dataclass(frozen=True, slots=True)
class Plan:
    """How much to write. `counted` roles fill `n_tokens`; the caps are in tokens. `with_plain`: every
    other piece is plain text, since what is weighed by chats alone loses more on prose (docs/log.md)."""

    purpose: Purpose
    seed: int
    n_tokens: int
    counted: tuple[Role, ...] = ("template", "user", "assistant", "text")
    n_parallel: int = 16
    max_question: int = 192
    max_answer: int = 384
    with_plain: bool = False

    def request_seed(self, number: int, turn: int) -> int:
        """A 32-bit seed; texts for different purposes never share one under the same --seed."""
        purpose = {"calibration": 0, "evaluation": 2, "recovery": 1 << 31}[self.purpose]
        return (self.seed * 1_000_003 + 4 * number + purpose + turn) % 2**32


@dataclass(slots=True)
class Turn:
    """A turn being written; `opening` is what plain text was begun with."""

    number: int
    temperature: float
    question: tuple[int, ...] | None = None  # None while the question itself is written
    question_text: str = ""
    opening: tuple[int, ...] = ()
    tokens: list[int] = field(default_factory=list)
    text: str = ""


def converse(
    writer: Writer,
    frame: Frame | None,
    plan: Plan,
    journal: Journal,
    *,
    bos: int | None = None,
    openings: Sequence[tuple[int, ...]] = (),
    seen: Seen | None = None,
    progress: Progress | None = None,
) -> None:
    """Add conversations to `journal` until `plan.n_tokens` are kept.

    Without a frame (a base model) each is plain text from `bos` on; with one, some are where there are
    `openings`, token sequences that such text begins with. `seen` holds what is not to be repeated.
    """
    talk = Talk(writer, frame, plan, journal, bos=bos, openings=openings, seen=seen or Seen())
    talk.run(progress)


def avoiding(conversations: Sequence[Conversation]) -> Seen:
    """What not to repeat of these: the questions, or texts that have none."""
    seen = Seen()
    for conversation in conversations:
        seen.add(_opening(conversation))
    return seen


class Talk:
    """The conversations in flight."""

    def __init__(
        self,
        writer: Writer,
        frame: Frame | None,
        plan: Plan,
        journal: Journal,
        *,
        bos: int | None,
        openings: Sequence[tuple[int, ...]],
        seen: Seen,
    ) -> None:
        if frame is None and bos is None:
            raise NothingToBeginFrom
        self.writer, self.frame, self.plan, self.journal = writer, frame, plan, journal
        self.bos, self.openings = bos, openings
        self.seen = seen
        for conversation in journal.accepted:
            self.seen.add(_opening(conversation))
        self.flying: dict[Hashable, Turn] = {}
        self.taken = journal.numbers
        self.next_number = 0
        self.dropped_in_a_row = 0
        self.kept = sum(self._counted(conversation) for conversation in journal.accepted)

    def run(self, progress: Progress | None) -> None:
        """Write until enough is kept. All that was begun is finished, or short answers would be favoured."""
        while self.kept < self.plan.n_tokens or self.flying:
            while len(self.flying) < self.plan.n_parallel and self._expected() < self.plan.n_tokens:
                self._begin()
            for id, event in self.writer.step():
                if id in self.flying:
                    self._take(id, event)
            if progress:
                progress(min(self.kept, self.plan.n_tokens), self.plan.n_tokens)

    def _expected(self) -> float:
        """Tokens kept once all in flight have landed, if they fare as those before."""
        landed = len(self.journal.accepted) + len(self.journal.rejected)
        mean = self.kept / landed if landed >= self.plan.n_parallel else self.plan.max_answer / 2
        return self.kept + mean * len(self.flying)

    def _begin(self) -> None:
        """Start the next number that the journal does not know."""
        while self.next_number in self.taken:
            self.next_number += 1
        number = self.next_number
        self.next_number += 1
        opening = self._opening_of(number)
        temperatures = PLAIN_TEMPERATURES if self._is_hot(opening) else TEMPERATURES
        turn = Turn(number, temperatures[number % len(temperatures)], opening=opening)
        if turn.opening:
            self._submit(turn, turn.opening, self.plan.max_answer, turn.temperature)
        else:
            assert self.frame is not None
            warm = max(turn.temperature, MIN_QUESTION_TEMPERATURE)
            self._submit(turn, self.frame.before, self.plan.max_question, warm)

    def _opening_of(self, number: int) -> tuple[int, ...]:
        """What plain text is begun with; empty for a conversation. Only the number decides, so that a run
        that goes on writes what it would have written."""
        if self.frame is None:
            assert self.bos is not None
            return (self.bos,)
        if not self.openings or number % PLAIN_PERIOD < PLAIN_PERIOD - len(PLAIN_TEMPERATURES):
            return ()
        return random.Random(self.plan.request_seed(number, 1)).choice(self.openings)

    def _is_hot(self, opening: tuple[int, ...]) -> bool:
        """Plain text beside chats is; all that a base model writes is as chats are."""
        return bool(opening) and self.frame is not None

    def _submit(self, turn: Turn, prompt: tuple[int, ...], cap: int, temperature: float) -> None:
        answering = turn.question is not None
        sampling = Sampling(
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            min_p=PLAIN_MIN_P if self._is_hot(turn.opening) else MIN_P,
            seed=self.plan.request_seed(turn.number, int(answering)),
        )
        id = f"{self.plan.purpose}-{turn.number}-{int(answering)}"
        self.flying[id] = turn
        self.writer.submit(id, GenerationRequest(prompt=prompt, sampling=sampling, max_tokens=cap))

    def _take(self, id: Hashable, event: Event | EngineError) -> None:
        turn = self.flying[id]
        if isinstance(event, Delta):
            turn.tokens.extend(event.tokens)
            turn.text += event.text
        elif isinstance(event, Done):
            del self.flying[id]
            self._finish(turn, ended=event.finish_reason == "stop", stop_token=event.stop_token)
        else:
            raise event

    def _finish(self, turn: Turn, *, ended: bool, stop_token: int | None) -> None:
        plain = bool(turn.opening)
        reason = fault(turn.tokens, turn.text, ended=ended or plain)
        asking = turn.question is None
        if reason is None and asking and self.seen.has(turn.tokens):
            reason = "duplicate"
        if reason is not None:
            role = "" if plain else " question" if asking else " answer"
            self._drop(turn, reason + role)
        elif plain:
            self._keep(self._text(turn))
        elif asking:
            self._answer(turn)
        else:
            self._keep(self._conversation(turn, stop_token))

    def _drop(self, turn: Turn, reason: str) -> None:
        self.journal.reject(turn.number, reason)
        self.dropped_in_a_row += 1
        if self.dropped_in_a_row >= MAX_DROPPED:
            raise NoUsableText(self.journal.reasons())

    def _answer(self, turn: Turn) -> None:
        """Ask for the answer to a question that passed."""
        assert self.frame is not None
        self.seen.add(turn.tokens)
        answer = Turn(turn.number, turn.temperature, tuple(turn.tokens), turn.text)
        prompt = (*self.frame.before, *turn.tokens, *self.frame.between)
        self._submit(answer, prompt, self.plan.max_answer, turn.temperature)

    def _keep(self, conversation: Conversation) -> None:
        self.dropped_in_a_row = 0
        self.journal.add(conversation)
        self.kept += self._counted(conversation)

    def _counted(self, conversation: Conversation) -> int:
        return sum(conversation.count(role) for role in self.plan.counted)

    def _text(self, turn: Turn) -> Conversation:
        """Plain text; what it was begun with is not the model's own."""
        self.seen.add(turn.tokens)
        spans = (Span("template", len(turn.opening)), Span("assistant", len(turn.tokens)))
        tokens = (*turn.opening, *turn.tokens)
        seed = self.plan.request_seed(turn.number, 0)
        return Conversation(turn.number, seed, turn.temperature, tokens, spans, assistant=turn.text)

    def _conversation(self, turn: Turn, stop_token: int | None) -> Conversation:
        """The whole sequence; the token that ends the answer is the assistant's own."""
        frame, question = self.frame, turn.question
        assert frame is not None
        assert question is not None
        end = frame.after[:1] or (() if stop_token is None else (stop_token,))
        rest = frame.after[1:]
        tokens = (*frame.before, *question, *frame.between, *turn.tokens, *end, *rest)
        spans = (
            Span("template", len(frame.before)),
            Span("user", len(question)),
            Span("template", len(frame.between)),
            Span("assistant", len(turn.tokens) + len(end)),
            Span("template", len(rest)),
        )
        seed = self.plan.request_seed(turn.number, 0)
        return Conversation(
            turn.number, seed, turn.temperature, tokens, spans, user=turn.question_text, assistant=turn.text
        )


def _opening(conversation: Conversation) -> list[int]:
    """The tokens that make a conversation the same as another: the question, or the text itself."""
    role: Role = "user" if conversation.count("user") else "assistant"
    return [conversation.tokens[i] for i in conversation.positions(role)]
