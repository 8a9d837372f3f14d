"""What a tuned model makes of held-out texts, beside its base: loss, perplexity, divergence.

Only the tokens that count are scored. The arithmetic of the figures is `quantize.divergence`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantize.divergence import Divergence, Estimate, TokenScores, clustered, join, summarise
from quantize.tuning.encoding import Example
from quantize.tuning.network import Tunable
from quantize.tuning.order import micro_batches

ROWS = 256  # logits compared at once: several (rows, vocabulary) float32
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Base and tuned model on the same tokens, in nats a token, errors clustered by chat.

    `before`, `after` are losses, or divergences from the teacher where there is one; `change` is paired.
    `divergence`: how far the tuned model is from its base, or from the teacher.
    """

    before: Estimate
    after: Estimate
    change: Estimate
    divergence: Divergence


def mean_loss(tunable: Tunable, examples: Sequence[Example], *, limit: int) -> float:
    """Mean over the tokens that count, nats; `limit`: tokens computed at once."""
    total = 0.0
    with torch.no_grad(), tunable.evaluating():
        for _, batch in _batches(examples, limit):
            total += float(tunable.token_losses(batch).double().sum())
    return total / sum(example.n_wanted for example in examples)


def compare(
    tunable: Tunable, examples: Sequence[Example], *, limit: int, progress: Progress | None = None
) -> Comparison:
    """Run base and tuned model, and the teacher, over the held-out sequences."""
    taught = tunable.teacher is not None
    moved: dict[int, TokenScores] = {}  # base against tuned
    pairs: dict[int, tuple[TokenScores, TokenScores]] = {}  # teacher against base, against tuned
    for chosen, batch in _batches(examples, limit):
        counts = [example.n_wanted for example in batch]
        with torch.no_grad(), tunable.evaluating():
            states = _states(tunable, batch)
            if taught:
                before, after = (_scores(tunable, states, "teacher", which) for which in ("base", "tuned"))
                both = zip(_split(before, counts), _split(after, counts), strict=True)
                pairs |= dict(zip(chosen, both, strict=True))
            else:
                scores = _scores(tunable, states, "base", "tuned")
                moved |= dict(zip(chosen, _split(scores, counts), strict=True))
        if progress:
            progress(len(moved) + len(pairs), len(examples))
    if taught:
        bases = _by_chat(examples, {index: pair[0] for index, pair in pairs.items()})
        tuned = _by_chat(examples, {index: pair[1] for index, pair in pairs.items()})
        columns = [(base.kl, new.kl) for base, new in zip(bases, tuned, strict=True)]
    else:
        tuned = _by_chat(examples, moved)
        columns = [(group.nll_reference, group.nll_candidate) for group in tuned]
    return Comparison(
        before=clustered([before for before, _ in columns]),
        after=clustered([after for _, after in columns]),
        change=clustered([after - before for before, after in columns]),
        divergence=summarise(tuned),
    )


def _batches(examples: Sequence[Example], limit: int) -> Iterator[tuple[list[int], list[Example]]]:
    lengths = [len(example.tokens) for example in examples]
    for chosen in micro_batches(lengths, range(len(examples)), limit=limit):
        yield chosen, [examples[i] for i in chosen]


def _states(tunable: Tunable, batch: Sequence[Example]) -> dict[str, Tensor]:
    """What each model's head is multiplied with, and the tokens that stand there."""
    tuned, targets = tunable.hidden(batch)
    with tunable.without_adapter():
        found = {"tuned": tuned, "base": tunable.hidden(batch)[0], "targets": targets}
    if tunable.teacher is not None:
        found["teacher"] = tunable.teacher.hidden(batch)[0]
    return found


def _scores(tunable: Tunable, states: dict[str, Tensor], reference: str, candidate: str) -> TokenScores:
    """Per token, computed where the models are, some rows at once."""
    parts = []
    for first in range(0, len(states["targets"]), ROWS):
        rows = slice(first, first + ROWS)
        models = [
            tunable.teacher or tunable if name == "teacher" else tunable for name in (reference, candidate)
        ]
        left, right = (
            model.logits(states[name][rows]).log_softmax(-1)
            for model, name in zip(models, (reference, candidate), strict=True)
        )
        target = states["targets"][rows, None]
        kl = (left.exp() * (left - right)).sum(-1)
        same = left.argmax(-1) == right.argmax(-1)
        nll = (-model.gather(1, target)[:, 0] for model in (left, right))
        kl, nll_left, nll_right = (value.double().cpu().numpy() for value in (kl, *nll))
        parts.append(TokenScores(kl, nll_left, nll_right, same.cpu().numpy()))
    return join(parts)


def _split(scores: TokenScores, counts: Sequence[int]) -> list[TokenScores]:
    cuts = np.cumsum(counts)[:-1]
    columns = (scores.kl, scores.nll_reference, scores.nll_candidate, scores.same_top)
    return [
        TokenScores(*parts) for parts in zip(*(np.split(column, cuts) for column in columns), strict=True)
    ]


def _by_chat(examples: Sequence[Example], scores: dict[int, TokenScores]) -> list[TokenScores]:
    """Sequences of one chat together: they are one draw."""
    chats: dict[int, list[TokenScores]] = {}
    for index in sorted(scores):
        chats.setdefault(examples[index].chat, []).append(scores[index])
    return [join(parts) for parts in chats.values()]
