"""Events of the engine -> OpenAI's objects: whole answers and the chunks of a stream."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.request import Delta, Done, TokenLogprob
from server.schema import chat, completion
from server.schema.usage import PromptTokensDetails, Timings, Usage

Finish = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Envelope:
    """What every object of one answer repeats."""

    id: str
    created: int
    model: str
    fingerprint: str

    @classmethod
    def new(cls, prefix: str, model: str, fingerprint: str) -> "Envelope":
        return cls(f"{prefix}-{secrets.token_hex(12)}", int(time.time()), model, fingerprint)


@dataclass(slots=True)
class Collected:
    """One choice, gathered from its events."""

    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    done: Done | None = None

    def add(self, event: Delta | Done) -> None:
        if isinstance(event, Done):
            self.done = event
        else:
            if event.anew:
                self.text.clear()
                self.logprobs.clear()
            self.text.append(event.text)
            self.logprobs += event.logprobs

    @property
    def content(self) -> str:
        return "".join(self.text)


def finish(done: Done | None) -> Finish:
    return "stop" if done is not None and done.finish_reason == "stop" else "length"


def usage(done: Sequence[Done], *, n_choices: int) -> Usage:
    """Prompt tokens count once for each prompt, not for each choice of it, as OpenAI counts."""
    prompts = done[::n_choices]
    n_prompt = sum(each.n_prompt_tokens for each in prompts)
    n_completion = sum(each.n_completion_tokens for each in done)
    return Usage(
        prompt_tokens=n_prompt,
        completion_tokens=n_completion,
        total_tokens=n_prompt + n_completion,
        prompt_tokens_details=PromptTokensDetails(sum(each.n_cached_tokens for each in prompts)),
        timings=Timings(max(each.prefill_s for each in done), max(each.decode_s for each in done)),
    )


def shown(text_bytes: bytes) -> str:
    """A token's text; part of a character shows as U+FFFD, `bytes` has it whole."""
    return text_bytes.decode("utf-8", "replace")


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> chat.Logprobs:
    content = [
        chat.TokenLogprob(
            shown(each.text_bytes),
            each.logprob,
            list(each.text_bytes),
            [chat.TopLogprob(shown(text), value, list(text)) for _, text, value in each.top],
        )
        for each in logprobs
    ]
    return chat.Logprobs(content)


def text_logprobs(logprobs: Sequence[TokenLogprob], *, offset: int) -> completion.TextLogprobs:
    """OpenAI's older shape; `offset` is where the first token's text begins."""
    tokens = [shown(each.text_bytes) for each in logprobs]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return completion.TextLogprobs(
        tokens,
        [each.logprob for each in logprobs],
        [{shown(text): value for _, text, value in each.top} for each in logprobs],
        offsets,
    )
