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

CATCH_UP = 256  # tokens that it reads in one step: a long prompt must not stop the streams


class Drafter:
    """The model and what it has read; `close` frees it."""

    def __init__(self, context: Context, stack: ExitStack | None = None) -> None:
        self.context = context
        self.call_s = 0.0  # of one call that guesses a token for every sequence, smoothed
        self._read: dict[int, list[int]] = {}  # by slot
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
                    n_batch=max(CATCH_UP, n_parallel),
                    n_seq_max=n_parallel,
                    n_outputs_max=n_parallel,
                    n_threads=n_threads,
                )
            )
            return cls(context, stack.pop_all())

    def ready(self, sequences: list[Sequence]) -> list[Sequence]:
        """Read on in what was written; the sequences of which all but the last token are read.

        None of them if llama.cpp cannot: nobody's text depends on guesses.
        """
        room = CATCH_UP
        batch = self.context.batch
        batch.clear()
        caught_up = []
        for sequence in sequences:
            slot, tokens = self._slot(sequence), sequence.tokens
            read = self._read.setdefault(slot, [])
            same = common_prefix(read, tokens)
            if same < len(read):
                self.context.remove(slot, same)
                del read[same:]
            missing = tokens[len(read) : len(tokens) - 1][:room]
            if missing:
                batch.extend(missing, start=len(read), sequence=slot, output=False)
                read += missing
                room -= len(missing)
            if len(read) >= len(tokens) - 1:
                caught_up.append(sequence)
        try:
            if len(batch):
                self.context.decode()
        except DecodeFailed:
            self._forget()
            return []
        return caught_up

    def guess(self, counts: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """The likeliest continuations, so many tokens each, of sequences that are `ready`.

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
        self.call_s += (seconds - self.call_s) * (0.3 if self.call_s else 1.0)
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
