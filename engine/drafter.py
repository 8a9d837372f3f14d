"""A small model of the same vocabulary that guesses what the large one will write.

Has a memory of its own, a sequence for each slot of the engine, and follows what is written there. Its
guesses are checked like any others, so that they change how fast a text is written and never which.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from engine.llama import Context, DecodeFailed, Model
from engine.prefix import common_prefix
from engine.request import ModelLoadFailed
from engine.sequence import Sequence

N_BATCH = 256  # tokens of one call of its own
FIRST_READ = 32  # tokens, before it is known how long it takes to read
SMOOTHING = 0.3  # weight of the newest time


class Drafter:
    """The model and what it has read; `close` frees it.

    It reads nothing unless it is told to: whose guesses pay is not its business.
    """

    def __init__(self, context: Context, stack: ExitStack | None = None) -> None:
        self.context = context
        self.call_s = 0.0  # of one call that guesses a token for every sequence, smoothed
        self.token_s = 0.0  # of a token that it reads without guessing, smoothed
        self._read: dict[int, list[int]] = {}  # by slot
        self._readers: dict[int, Sequence] = {}  # by slot: whose tokens were compared with those
        self._stack = stack or ExitStack()

    @classmethod
    def open(
        cls,
        path: Path,
        target: Model,
        *,
        n_ctx: int,
        n_parallel: int,
        n_threads: int | None,
        n_gpu_layers: int | None = None,
    ) -> "Drafter":
        """Load the draft model of `target`. Raises ModelLoadFailed, also when its vocabulary is another."""
        with ExitStack() as stack:
            model = stack.enter_context(Model.open(path, n_gpu_layers=n_gpu_layers))
            check_vocabulary(model, target)
            context = stack.enter_context(
                Context.open(
                    model,
                    n_ctx=n_ctx * n_parallel,
                    n_batch=max(N_BATCH, n_parallel),
                    n_seq_max=n_parallel,
                    n_outputs_max=n_parallel,
                    n_threads=n_threads,
                )
            )
            return cls(context, stack.pop_all())

    def warm_up(self, token: int) -> None:
        """Learn how long calls take, before anything depends on it. Raises DecodeFailed."""
        for count in (1, min(self.context.n_batch, self.context.n_ctx_seq, 2 * FIRST_READ), 1):
            self.context.clear()
            self.context.batch.clear()
            self.context.batch.extend([token] * count, start=0, sequence=0, output=True)
            started = time.perf_counter()
            self.context.decode()
            seconds = time.perf_counter() - started
            if count > 1:
                self.token_s = seconds / count
            self.call_s = seconds  # the first call also brings the weights into memory
        self.context.clear()

    def n_missing(self, sequence: Sequence) -> int:
        """Tokens that it has to read before it can guess."""
        slot = self._slot(sequence)
        read = self._read.setdefault(slot, [])
        if self._readers.get(slot) is not sequence:
            self._readers[slot] = sequence
            self._cut(slot, common_prefix(read, sequence.tokens))
        return max(0, len(sequence.tokens) - 1 - len(read))

    def read(self, sequences: list[Sequence], *, within_s: float) -> list[Sequence]:
        """Read on in what was written, for about so long; those of which all but the last token are read.

        None of them if llama.cpp cannot: nobody's text depends on guesses.
        """
        room = self._room(within_s)
        batch = self.context.batch
        batch.clear()
        caught_up, taken = [], []
        for sequence in sequences:
            slot, tokens, read = self._slot(sequence), sequence.tokens, self._follow(sequence)
            missing = tokens[len(read) : len(tokens) - 1][:room]
            if missing:
                batch.extend(missing, start=len(read), sequence=slot, output=False)
                taken.append((read, missing))
                room -= len(missing)
            if len(read) + len(missing) >= len(tokens) - 1:
                caught_up.append(sequence)
        if not taken:
            return caught_up
        started = time.perf_counter()
        try:
            self.context.decode()
        except DecodeFailed:
            self._forget()
            return []
        for read, missing in taken:
            read.extend(missing)
        n_tokens, seconds = len(batch), time.perf_counter() - started
        if n_tokens >= FIRST_READ or not self.token_s:  # short calls take what one guess does
            a_token_s = seconds / n_tokens
            self.token_s += (a_token_s - self.token_s) * (SMOOTHING if self.token_s else 1.0)
        return caught_up

    def guess(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """The likeliest continuations, so many tokens each, of sequences that were `read`.

        None if llama.cpp cannot.
        """
        guesses: dict[Sequence, list[int]] = {sequence: [] for sequence in counts}
        for depth in range(max(counts.values(), default=0)):
            asked = [sequence for sequence, count in counts.items() if count > depth]
            try:
                chosen = self._next(asked, guesses)
            except DecodeFailed:
                self._forget()
                return {}
            for sequence, token in zip(asked, chosen, strict=True):
                guesses[sequence].append(token)
        return guesses

    def close(self) -> None:
        """Free the model and its memory."""
        self._stack.close()

    def _forget(self) -> None:
        """Begin anew: after a failed call nobody knows which cells it left."""
        self.context.clear()
        self._read.clear()
        self._readers.clear()

    def _room(self, within_s: float) -> int:
        """Tokens that can be read in that time, in one call; few while it is not known how long they take."""
        most = self.context.n_batch
        if not self.token_s:
            return min(most, FIRST_READ)
        return most if within_s >= most * self.token_s else max(0, int(within_s / self.token_s))

    def _follow(self, sequence: Sequence) -> list[int]:
        """What it has read of a sequence, less the guesses of its own that were wrong."""
        self.n_missing(sequence)
        slot = self._slot(sequence)
        self._cut(slot, common_prefix(self._read[slot], sequence.tokens))
        return self._read[slot]

    def _cut(self, slot: int, length: int) -> None:
        """Forget all but so many tokens of a slot."""
        read = self._read[slot]
        if length < len(read):
            self.context.remove(slot, length)
            del read[length:]

    def _next(self, asked: list[Sequence], guesses: Mapping[Sequence, list[int]]) -> list[int]:
        """One token for each: read the last one and take the likeliest."""
        started = time.perf_counter()
        batch = self.context.batch
        batch.clear()
        entries = []
        for sequence in asked:
            read = self._read[self._slot(sequence)]
            token = guesses[sequence][-1] if guesses[sequence] else sequence.tokens[-1]
            if len(read) >= len(sequence.tokens) + len(guesses[sequence]):  # it was read as an earlier guess
                self.context.remove(self._slot(sequence), len(sequence.tokens) + len(guesses[sequence]) - 1)
                del read[len(sequence.tokens) + len(guesses[sequence]) - 1 :]
            entries.append(batch.add(token, len(read), self._slot(sequence), output=True))
            read.append(token)
        self.context.decode()
        chosen = [int(self.context.logits(entry).argmax()) for entry in entries]
        seconds = time.perf_counter() - started
        self.call_s += (seconds - self.call_s) * (SMOOTHING if self.call_s else 1.0)
        return chosen

    @staticmethod
    def _slot(sequence: Sequence) -> int:
        assert sequence.slot is not None
        return sequence.slot


def check_vocabulary(draft: Model, target: Model) -> None:
    """Raise ModelLoadFailed unless both models mean the same by a token."""
    if draft.n_vocab != target.n_vocab:
        raise ModelLoadFailed(
            f"draft_model {draft.path}: its vocabulary has {draft.n_vocab} tokens and that of "
            f"{target.path.name} {target.n_vocab}; choose a smaller model of the same family"
        )
    for token in range(0, target.n_vocab, max(1, target.n_vocab // 997)):
        if draft.piece(token, special=True) != target.piece(token, special=True):
            raise ModelLoadFailed(
                f"draft_model {draft.path}: token {token} is {draft.token_text(token)!r} in it and "
                f"{target.token_text(token)!r} in {target.path.name}; choose a model of the same family"
            )
