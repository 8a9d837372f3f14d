"""Fields that chat and plain completions share: how tokens are chosen and when to stop."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Temperature = Annotated[float, Meta(ge=0, le=2)]
Fraction = Annotated[float, Meta(ge=0, le=1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Choices = Annotated[int, Meta(ge=1, le=8)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
StopText = Annotated[str, Meta(min_length=1, max_length=500)]
StopTexts = Annotated[list[StopText], Meta(max_length=16)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]


class SamplingFields(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is left out comes from the assistant's own defaults, then from the server's."""

    temperature: Temperature | None = None
    top_p: Fraction | None = None
    top_k: Count | None = None
    min_p: Fraction | None = None
    typical_p: Fraction | None = None
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] | None = None
    dry_base: Annotated[float, Meta(ge=1, le=100)] | None = None
    dry_allowed_length: Annotated[int, Meta(ge=1, le=2**20)] | None = None
    dry_penalty_last_n: Annotated[int, Meta(ge=0, le=2**20)] | None = None


class GenerationFields(SamplingFields, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sampling and everything else that both kinds of completion take."""

    model: Name
    n: Choices | None = None
    seed: Seed | None = None
    stop: StopText | StopTexts | None = None
    logit_bias: dict[int, Bias] | None = None
    ignore_eos: bool | None = None
    max_tokens: Positive | None = None
    stream: bool | None = None
    stream_options: "StreamOptions | None" = None
    adapter: Annotated[str, Meta(max_length=100)] | None = None  # "": none, whatever the assistant says
    adapter_scale: Annotated[float, Meta(ge=-100, le=100)] | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    # Accepted, because they cannot change an answer here.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None
