"""What an answer cost and what it rests on."""

import msgspec


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Timings(msgspec.Struct):
    """Seconds, of the longest choice; an extension."""

    prefill_s: float
    decode_s: float


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    timings: Timings


class Source(msgspec.Struct, kw_only=True):
    """A passage that was shown to the model; `index` is the number that the answer cites as [index].

    `start` and `end` are character offsets of `quote` in the parsed text of `file`.
    """

    index: int
    file: str
    title: str
    page: int | None
    heading: str | None
    start: int
    end: int
    quote: str
    score: float
