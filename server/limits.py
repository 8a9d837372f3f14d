"""How much each API key may use: open requests and tokens a minute.

Pure bookkeeping: no clock (every call is told the time, in seconds), no HTTP, no engine. Which sequence is
decoded next is the engine's business; here is decided what may reach it at all.
"""

import math
from dataclasses import dataclass

from engine.request import Tenant
from server.errors import RequestOverRate, TokensUsedUp, TooManyRequests

#: Nobody knows when one of a key's open requests ends; a client may ask again after this.
BUSY_RETRY_S = 1


@dataclass(frozen=True, slots=True)
class Policy:
    """What one key may do. `name` is empty for everybody where no key is needed; None is no limit."""

    name: str = ""
    weight: float = 1.0
    priority: int = 0
    max_requests: int | None = None
    max_running: int | None = None
    tokens_per_minute: int | None = None
    ttft_s: float | None = None
    total_s: float | None = None
    isolated_cache: bool = False

    @property
    def tenant(self) -> Tenant:
        """The same, as far as the engine's scheduler has to know it."""
        return Tenant(self.name, self.weight, self.priority, self.max_running)

    def salt(self, given: str) -> str:
        """The salt under which prefixes are cached; `given` is the request's own ("" for none).

        A prefix of its own for each case: no salt that a client invents leads into another key's cache.
        """
        if self.isolated_cache:
            return f"key:{self.name}\n{given}"
        return f"any\n{given}" if given else ""


@dataclass(frozen=True, slots=True)
class Rate:
    """The state of a key's tokens a minute, as told to its clients."""

    limit: int
    remaining: int
    reset_s: float  # until `remaining` is `limit` again

    def headers(self) -> dict[str, str]:
        """As OpenAI sends them."""
        return {
            "x-ratelimit-limit-tokens": str(self.limit),
            "x-ratelimit-remaining-tokens": str(self.remaining),
            "x-ratelimit-reset-tokens": duration(self.reset_s),
        }


class Bucket:
    """A minute's tokens, refilled evenly. May be in debt: what a request used is known only when it ends."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """Tokens that may be used; negative while a debt is paid off."""
        grown = self._level + max(0.0, now - self._at) * self.per_minute / 60
        self._level = min(float(self.per_minute), grown)
        self._at = max(self._at, now)
        return self._level

    def take(self, n: int, now: float) -> None:
        """Use n tokens, whether they are there or not; a negative n gives them back."""
        self._level = min(float(self.per_minute), self.level(now) - n)

    def wait_s(self, n: int, now: float) -> float:
        """Seconds until n tokens are there."""
        return max(0.0, round((n - self.level(now)) * 60 / self.per_minute, 6))  # 1e-17 tokens are no lack

    def rate(self, now: float) -> Rate:
        remaining = max(0, math.floor(self.level(now)))
        return Rate(self.per_minute, remaining, self.wait_s(self.per_minute, now))


class Account:
    """What one key's requests use now, all of them together."""

    def __init__(self, policy: Policy, now: float) -> None:
        self.policy = policy
        self.n_open = 0
        self.bucket = Bucket(policy.tokens_per_minute, now) if policy.tokens_per_minute else None

    def enter(self, now: float) -> None:
        """Begin a request, before any work is done for it; each that was let in leaves once."""
        most = self.policy.max_requests
        if most is not None and self.n_open >= most:
            raise TooManyRequests(self.policy.name, most, BUSY_RETRY_S)
        if self.bucket and (wait_s := self.bucket.wait_s(1, now)):
            raise TokensUsedUp(self.policy.name, self.bucket.per_minute, 1, wait_s)
        self.n_open += 1

    def leave(self) -> None:
        self.n_open -= 1

    def reserve(self, n_prompt: int, n_answer: int, now: float) -> int:
        """Tokens set aside for a request of this size; TokensUsedUp when they are not there yet.

        A long `max_tokens` is rarely used up, so it never asks for more than a full bucket: the request runs
        once that is there, and what it uses beyond is a debt. A prompt larger than the bucket never runs.
        """
        if self.bucket is None:
            return 0
        limit = self.bucket.per_minute
        if n_prompt >= limit:
            raise RequestOverRate(self.policy.name, limit, n_prompt)
        wanted = min(n_prompt + n_answer, limit)
        if wait_s := self.bucket.wait_s(wanted, now):
            raise TokensUsedUp(self.policy.name, limit, wanted, wait_s)
        self.bucket.take(wanted, now)
        return wanted

    def charge(self, n_tokens: int, now: float) -> None:
        """Take tokens that were used beyond the reserved ones; fewer than 0 are given back."""
        if self.bucket:
            self.bucket.take(n_tokens, now)


class Usage:
    """The tokens of one request, counted while they come, so that one that is cut short is counted too.

    `prompts`: tokens of each prompt as far as known; the engine tells them exactly at the end. A prompt
    counts once, however many choices are written for it, as OpenAI counts.
    """

    def __init__(self, prompts: tuple[int, ...] = (), *, n_choices: int = 1) -> None:
        self._prompts = dict(enumerate(prompts))
        self._cached: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._n_choices = n_choices
        self._has_read = False

    @property
    def prompt(self) -> int:
        return sum(self._prompts.values())

    @property
    def cached(self) -> int:
        return sum(self._cached.values())

    @property
    def completion(self) -> int:
        return sum(self._written.values())

    @property
    def total(self) -> int:
        return self.prompt + self.completion

    @property
    def begun(self) -> bool:
        return bool(self._written) or self._has_read

    def wrote(self, index: int, n_tokens: int, *, n_prompt: int = 0, anew: bool = False) -> None:
        """A choice has more tokens, `anew`: these and no others.

        `n_prompt`: those of its prompt, when the engine tells them now.
        """
        self._written[index] = n_tokens + (0 if anew else self._written.get(index, 0))
        number, choice = divmod(index, self._n_choices)
        if n_prompt and choice == 0:
            self._prompts[number] = n_prompt

    def read(self, n_tokens: int) -> None:
        """More of the texts to embed or to rank was read."""
        self._prompts[0] = self._prompts.get(0, 0) + n_tokens
        self._has_read = True

    def ended(self, index: int, *, n_prompt: int, n_cached: int, n_completion: int) -> None:
        """A choice is complete; these numbers hold, whatever was counted before."""
        self._written[index] = n_completion
        number, choice = divmod(index, self._n_choices)
        if choice == 0:
            self._prompts[number] = n_prompt
            self._cached[number] = n_cached


def duration(seconds: float) -> str:
    """As OpenAI writes one: `250ms`, `7.66s`, `1m30s`; rounded up."""
    if 0 < seconds <= 0.999:
        return f"{math.ceil(seconds * 1000)}ms"
    hundredths = math.ceil(round(seconds * 100, 6))
    minutes, hundredths = divmod(hundredths, 6000)
    return (f"{minutes}m" if minutes else "") + f"{hundredths / 100:g}s"
