"""How long a call will take, learnt from those before it: how many prompt tokens and guesses it may hold.

Pure: seconds in, numbers of tokens out. Times are smoothed, so that the estimates follow a machine that
others slow down.
"""

from bisect import bisect_left
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

MIN_PROMPT = 8  # tokens of prompts in every call, whatever the stall: a prompt must come to its end
CAUTION = 0.85  # of the stall is planned for: times vary, and what was written still has its way to go
SMOOTHING = 0.3  # weight of the newest time
WORTH = 1.03  # guesses must promise this much more to be tried
GUESSES_A_SEQUENCE = 8  # in one call, at most
FORGETTING = 0.004  # a step: how soon a sequence that guessed badly is tried again
TRUST_EVENTS = 4.0  # guesses that the common experience counts for, against a sequence's own


class Pace:
    """Estimates of one engine; while somebody is writing, a call may take `max_stall_s` (None: any time)."""

    def __init__(self, *, max_stall_s: float | None = None) -> None:
        self.max_stall_s = max_stall_s
        self._writing_s: dict[int, float] = {}  # a call by its tokens, none of them of prompts
        self._prompt_token_s: float | None = None

    def learn(self, *, n_writing: int, n_prompt: int, seconds: float) -> None:
        """A call held so many tokens of writing sequences, guesses too, and of prompts."""
        if not n_prompt:
            before = self._writing_s.get(n_writing, seconds)
            self._writing_s[n_writing] = before + SMOOTHING * (seconds - before)
        elif n_prompt >= MIN_PROMPT:
            a_token_s = max(1e-9, seconds - self.writing_s(n_writing)) / n_prompt
            before_s = a_token_s if self._prompt_token_s is None else self._prompt_token_s
            # Faster up than down: a prompt's later tokens take longer than its first ones.
            weight = max(SMOOTHING, 0.6 * (a_token_s > before_s))
            self._prompt_token_s = before_s + weight * (a_token_s - before_s)

    def writing_s(self, n_tokens: int) -> float:
        """Seconds of a call of so many writing sequences' tokens: between known ones on a line."""
        if not n_tokens or not self._writing_s:
            return 0.0
        known = sorted(self._writing_s)
        at = bisect_left(known, n_tokens)
        if at < len(known) and known[at] == n_tokens:
            return self._writing_s[n_tokens]
        if at == 0 or len(known) == 1:
            return self._writing_s[known[0]] * max(1.0, n_tokens / known[0])
        right = min(at, len(known) - 1)
        left = right - 1
        low, high = self._writing_s[known[left]], self._writing_s[known[right]]
        slope = max(0.0, high - low) / (known[right] - known[left])
        return low + slope * (n_tokens - known[left])

    def n_prompt(self, n_writing: int) -> int | None:
        """Prompt tokens that the next call may hold beside writing sequences; None: any number."""
        if self.max_stall_s is None or not n_writing:
            return None
        if self._prompt_token_s is None:
            return MIN_PROMPT
        room_s = CAUTION * (self.max_stall_s - self.writing_s(n_writing))
        return max(MIN_PROMPT, int(room_s / self._prompt_token_s))


@dataclass(slots=True)
class _Record:
    """How often guesses for one sequence were right."""

    tried: float = 0.0
    right: float = 0.0


HOPE = _Record(2.0, 1.0)  # before anything is known


@dataclass(slots=True)
class Luck:
    """How far guesses can be trusted, sequence by sequence, and how many are worth their time."""

    pace: Pace
    n_tried: int = 0
    n_right: int = 0
    _common: _Record = field(default_factory=lambda: replace(HOPE))
    _own: dict[Hashable, _Record] = field(default_factory=dict)

    def learn(self, key: Hashable, *, n_guesses: int, n_right: int) -> None:
        """Of a sequence's guesses the first `n_right` were; those behind the first wrong one say nothing."""
        self.n_tried += n_guesses
        self.n_right += n_right
        n_tried = min(n_guesses, n_right + 1)
        for record in (self._own.setdefault(key, _Record()), self._common):
            record.tried = 0.9 * record.tried + n_tried
            record.right = 0.9 * record.right + n_right

    def forget(self, key: Hashable) -> None:
        """The sequence ended."""
        self._own.pop(key, None)

    def chance(self, key: Hashable) -> float:
        """That the next guess is right, given that those before it were."""
        common = self._common.right / max(1.0, self._common.tried)
        own = self._own.get(key, _Record())
        return (own.right + TRUST_EVENTS * common) / (own.tried + TRUST_EVENTS)

    def worthwhile(self, guesses: Mapping[K, int], n_writing: int, *, depth_s: float = 0.0) -> dict[K, int]:
        """How many of each sequence's guesses make the next call write most tokens a second.

        `guesses`: how many there are; `depth_s`: what the first, the second ... of all of them takes to make.
        """
        gains: list[tuple[float, K, int]] = []
        for key, count in guesses.items():
            own = self._own.get(key)
            if own is not None:
                own.tried *= 1 - FORGETTING
                own.right *= 1 - FORGETTING
            chance = self.chance(key)
            gains += [(chance**place, key, place) for place in range(1, count + 1)]
        gains.sort(key=lambda gain: -gain[0])
        best, best_rate = 0, WORTH * n_writing / max(1e-9, self.pace.writing_s(n_writing))
        expected, depth = float(n_writing), 0
        for n_guesses, (gain, _, place) in enumerate(gains, start=1):
            expected, depth = expected + gain, max(depth, place)
            seconds = self.pace.writing_s(n_writing + n_guesses) + depth * depth_s
            rate = expected / max(1e-9, seconds)
            if rate > best_rate:
                best, best_rate = n_guesses, rate
        if not best:  # bad luck is not believed for ever
            self._common.tried += FORGETTING * (HOPE.tried - self._common.tried)
            self._common.right += FORGETTING * (HOPE.right - self._common.right)
        counts: dict[K, int] = {}
        for _, key, _ in gains[:best]:
            counts[key] = counts.get(key, 0) + 1
        return counts
