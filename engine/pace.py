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
# Of the stall: a call of prompts of those over their share, which others who come wait for. It makes 50 ms of
# 250, not much more than a call of eight that write (30 ms), which they wait for as well.
BRIEF = 0.2
CAUTION = 0.75  # of the stall is planned for: times vary, and what was written still has its way to go
# How much longer a prompt's tokens took than was thought: the stall is planned for so much less, on a machine
# that others use too. A tenth of it is forgotten a call; more than half as much again is believed to be an
# accident.
CALM = 0.9
MOST_SURPRISE = 1.5
SMOOTHING = 0.3  # weight of the newest time
WORTH = 1.03  # guesses must promise this much more to be tried
GUESSES_A_SEQUENCE = 8  # in one call, at most
FORGETTING = 0.004  # a step: how soon a sequence that guessed badly is tried again
TRUST_EVENTS = 4.0  # guesses that the common experience counts for, against a sequence's own


class Pace:
    """Estimates of one engine; while somebody is writing, a call may take `max_stall_s` (None: any time)."""

    def __init__(self, *, max_stall_s: float | None = None) -> None:
        self.max_stall_s = max_stall_s
        self._writing_s: dict[int, float] = {}  # a call by its sequences, a token of each and nothing else
        # A call by its sequences and then its tokens, guesses among them. Apart from the other, since tokens
        # of sequences of unlike numbers are calls of their own within llama.cpp.
        self._guessing_s: dict[int, dict[int, float]] = {}
        self._prompt_token_s: float | None = None
        self._surprise = 1.0

    def learn(self, *, n_writing: int, n_prompt: int, seconds: float, n_guesses: int = 0) -> None:
        """A call held a token of so many writing sequences, so many guesses, and tokens of prompts."""
        if not n_prompt:
            known = self._guessing_s.setdefault(n_writing, {}) if n_guesses else self._writing_s
            n_tokens = n_writing + n_guesses
            before = known.get(n_tokens, seconds)
            known[n_tokens] = before + SMOOTHING * (seconds - before)
        elif n_prompt >= MIN_PROMPT:
            a_token_s = max(1e-9, seconds - self.writing_s(n_writing)) / n_prompt
            before_s = a_token_s if self._prompt_token_s is None else self._prompt_token_s
            calmer = 1 + CALM * (self._surprise - 1)
            self._surprise = min(MOST_SURPRISE, max(a_token_s / before_s, calmer))
            # Faster up than down: a prompt's later tokens take longer than its first ones.
            weight = max(SMOOTHING, 0.6 * (a_token_s > before_s))
            self._prompt_token_s = before_s + weight * (a_token_s - before_s)

    def writing_s(self, n_writing: int) -> float:
        """Seconds of a call of so many writing sequences: between known ones on a line."""
        return _on_line(self._writing_s, n_writing)

    def guessing_s(self, n_writing: int, n_guesses: int) -> float:
        """The same with guesses; as long as none were made beside so many, as of so many sequences."""
        known = self._guessing_s.get(n_writing)
        if not known or not n_guesses:
            return self.writing_s(n_writing + n_guesses)
        return _on_line({n_writing: self.writing_s(n_writing)} | known, n_writing + n_guesses)

    def doubt(self, n_writing: int) -> None:
        """No guesses pay beside so many sequences: what they took is believed a little less."""
        for n_tokens, seconds in self._guessing_s.get(n_writing, {}).items():
            hoped = self.writing_s(n_tokens)
            self._guessing_s[n_writing][n_tokens] = seconds + FORGETTING * (hoped - seconds)

    def n_prompt(self, n_writing: int) -> int | None:
        """Prompt tokens that the next call may hold beside writing sequences; None: any number."""
        if self.max_stall_s is None or not n_writing:
            return None
        if self._prompt_token_s is None:
            return MIN_PROMPT
        room_s = CAUTION * (self.max_stall_s - self.writing_s(n_writing))
        return max(MIN_PROMPT, int(room_s / self._surprise / self._prompt_token_s))

    def n_brief(self) -> int | None:
        """Prompt tokens of a call that others who come should not have to wait for; None: any number."""
        if self.max_stall_s is None:
            return None
        if self._prompt_token_s is None:
            return MIN_PROMPT
        return max(MIN_PROMPT, int(CAUTION * BRIEF * self.max_stall_s / self._prompt_token_s))


def _on_line(seconds: Mapping[int, float], n_tokens: int) -> float:
    """Between the two known numbers of tokens that are nearest, or beyond the last two; 0 of nothing."""
    if not n_tokens or not seconds:
        return 0.0
    known = sorted(seconds)
    at = bisect_left(known, n_tokens)
    if at < len(known) and known[at] == n_tokens:
        return seconds[n_tokens]
    if at == 0 or len(known) == 1:
        return seconds[known[0]] * max(1.0, n_tokens / known[0])
    right = min(at, len(known) - 1)
    left = right - 1
    low, high = seconds[known[left]], seconds[known[right]]
    slope = max(0.0, high - low) / (known[right] - known[left])
    return low + slope * (n_tokens - known[left])


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
            seconds = self.pace.guessing_s(n_writing, n_guesses) + depth * depth_s
            rate = expected / max(1e-9, seconds)
            if rate > best_rate:
                best, best_rate = n_guesses, rate
        if not best:  # neither bad luck nor a slow call is believed for ever
            self.pace.doubt(n_writing)
            self._common.tried += FORGETTING * (HOPE.tried - self._common.tried)
            self._common.right += FORGETTING * (HOPE.right - self._common.right)
        counts: dict[K, int] = {}
        for _, key, _ in gains[:best]:
            counts[key] = counts.get(key, 0) + 1
        return counts
