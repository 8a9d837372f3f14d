"""One request of a key from its first byte to its last: its place, its reserved tokens, its deadlines.

The clock and the figures around server/limits.py; knows neither HTTP nor wire types.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

from engine.request import Delta, Event
from server.errors import FirstTokenLate, Refused, RequestTooLong
from server.limits import Account, Policy, Usage
from server.metrics import KeyFigures

T = TypeVar("T")
Clock = Callable[[], float]

#: Seconds that a client gets after `total_s` to read that its request took too long.
READING_S = 5.0


class Ticket:
    """`enter`, `reserve`, then every event that comes, then `close`, whatever happened in between."""

    def __init__(self, account: Account, figures: KeyFigures, clock: Clock) -> None:
        self.policy: Policy = account.policy
        self._account = account
        self._figures = figures
        self._clock = clock
        self._started = clock()
        began = asyncio.get_running_loop().time()
        self._first_at = began + (self.policy.ttft_s or math.inf)
        self._end_at = began + (self.policy.total_s or math.inf)
        self._usage = Usage()
        self._reserved = 0
        self._is_open = False

    @property
    def is_metered(self) -> bool:
        """Whether prompts must be counted before they are run."""
        return self._account.bucket is not None

    @property
    def age_s(self) -> float:
        return self._clock() - self._started

    def enter(self) -> None:
        """Take a place; raises Refused when the key has none left, or no tokens."""
        self._figures.asked(self.policy.name)
        self._account.enter(self._clock())
        self._is_open = True
        self._figures.entered(self.policy.name)

    def reserve(self, usage: Usage, *, n_answer: int) -> None:
        """Set tokens aside for prompts of a known size and answers of `n_answer`; raises Refused."""
        self._reserved = self._account.reserve(usage.prompt, n_answer, self._clock())
        self._usage = usage

    def reserve_guess(self, n_prompt: int) -> None:
        """The same for texts whose size is a guess: never refuses for good. They are charged as `read` tells,
        and `settle` at last."""
        self._reserved = self._account.reserve(0, n_prompt, self._clock())

    def settle(self, usage: Usage | None = None) -> None:
        """The request uses no more: give back what was reserved beyond. `usage` replaces what was counted."""
        self._usage = usage or self._usage
        self._charge(self._usage.total - self._reserved)

    def saw(self, index: int, event: Event) -> None:
        """Count an event of a choice; what goes beyond the reserved tokens is missed by others at once."""
        if isinstance(event, Delta):
            self._usage.wrote(index, len(event.tokens), n_prompt=event.n_prompt_tokens, anew=event.anew)
        else:
            self._usage.ended(
                index,
                n_prompt=event.n_prompt_tokens,
                n_cached=event.n_cached_tokens,
                n_completion=event.n_completion_tokens,
            )
        self._charge_beyond()

    def read(self, n_tokens: int) -> None:
        """Count what was read of texts to embed or to rank, while more of them are to be read."""
        self._usage.read(n_tokens)
        self._charge_beyond()

    def forgive(self) -> None:
        """A request failed: it costs what it got, and nothing before its first token."""
        self.settle(self._usage if self._usage.begun else Usage())

    def close(self) -> None:
        """Give back the place and what was not used. Without a call of `enter` before, nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self.settle()
        self._account.leave()
        self._figures.left(self.policy.name, self._usage)

    async def in_time(self, step: Awaitable[T], *, is_first: bool) -> T:
        """The result of a step, which is cancelled at the key's deadlines.

        `is_first`: no token has come yet. Raises FirstTokenLate or RequestTooLong.
        """
        at = min(self._end_at, self._first_at) if is_first else self._end_at
        if at == math.inf:
            return await step
        deadline = asyncio.timeout_at(at)
        try:
            async with deadline:
                return await step
        except TimeoutError:
            if not deadline.expired():  # somebody else's
                raise
        raise self._late(at)

    @property
    def lasts_s(self) -> float | None:
        """Seconds in which an answer that has begun is sent, or its client does not read; None: no limit."""
        if self._end_at == math.inf:
            return None
        return max(0.0, self._end_at - asyncio.get_running_loop().time()) + READING_S

    def headers(self) -> dict[str, str]:
        """The state of the key's tokens for its client; none without `tokens_per_minute`."""
        bucket = self._account.bucket
        return bucket.rate(self._clock()).headers() if bucket else {}

    def _late(self, at: float) -> Refused:
        """What a passed deadline is told as."""
        if at == self._end_at:
            return RequestTooLong(self.policy.total_s or 0)
        return FirstTokenLate(self.policy.ttft_s or 0)

    def _charge_beyond(self) -> None:
        if (beyond := self._usage.total - self._reserved) > 0:
            self._charge(beyond)

    def _charge(self, n_tokens: int) -> None:
        self._account.charge(n_tokens, self._clock())
        self._reserved += n_tokens


class Accounts:
    """The accounts of all keys, by name. `clock` tells seconds."""

    def __init__(
        self, policies: Iterable[Policy], figures: KeyFigures, *, clock: Clock = time.monotonic
    ) -> None:
        self._figures = figures
        self._clock = clock
        self._accounts = {policy.name: Account(policy, clock()) for policy in policies}
        for name in self._accounts:
            figures.know(name)

    def ticket(self, name: str) -> Ticket:
        """A ticket for a request under this name, which holds nothing yet."""
        return Ticket(self._accounts[name], self._figures, self._clock)
