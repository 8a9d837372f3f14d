"""What a file answers beside what the source answers: a few of the held-out questions, greedily.

Opens one model at a time. Which questions, how long; the report lays the texts side by side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from engine.llama import Model
from engine.request import Delta, Done, GenerationRequest, Sampling
from quantize.calibration.conversation import Conversation
from quantize.calibration.texts import open_loop
from quantize.measure import Backend

N_QUESTIONS = 3
N_TOKENS = 48
LONGEST_QUESTION = 160  # characters: a report is to be read
OPENING = 16  # tokens of a plain text that are the question


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model says to one question."""

    question: str
    text: str
    tokens: tuple[int, ...]

    def same_as(self, other: "Answer") -> int:
        """Tokens before the first that differs."""
        pairs = zip(self.tokens, other.tokens, strict=False)
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def answers(path: Path, conversations: Sequence[Conversation], *, backend: Backend) -> list[Answer]:
    """Greedy answers of at most N_TOKENS to the first short questions; the same questions for every file."""
    chosen = _chosen(conversations)
    prompts = [_prompt(conversation) for conversation in chosen]
    n_ctx = max(map(len, prompts)) + N_TOKENS + 8
    tokens: list[list[int]] = [[] for _ in prompts]
    texts = [""] * len(prompts)
    with (
        Model.open(path, n_gpu_layers=backend.n_gpu_layers) as model,
        open_loop(model, n_ctx, len(prompts), backend) as loop,
    ):
        for number, prompt in enumerate(prompts):
            loop.submit(number, GenerationRequest(prompt, Sampling(temperature=0), max_tokens=N_TOKENS))
        left = len(prompts)
        while left:
            for number, event in loop.step():
                if isinstance(event, Delta):
                    tokens[number].extend(event.tokens)
                    texts[number] += event.text
                elif isinstance(event, Done):
                    left -= 1
                else:
                    raise event
        asked = [each.user or model.detokenize(prompt) for each, prompt in zip(chosen, prompts, strict=True)]
    return [Answer(*each) for each in zip(asked, texts, map(tuple, tokens), strict=True)]


def _chosen(conversations: Sequence[Conversation]) -> list[Conversation]:
    """Short questions first in the order they were written, longer ones where there are too few."""
    short = [each for each in conversations if len(each.user or "") <= LONGEST_QUESTION]
    rest = [each for each in conversations if each not in short]
    return [*short, *rest][:N_QUESTIONS]


def _prompt(conversation: Conversation) -> tuple[int, ...]:
    """All before the answer; of a plain text its first tokens."""
    first = next(conversation.positions("assistant"))
    return conversation.tokens[: first if conversation.count("user") else first + OPENING]
