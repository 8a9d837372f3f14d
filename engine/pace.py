"""How long a call will take, learnt from those before it, and how many prompt tokens it may hold.

Pure: seconds in, numbers of tokens out. Times are smoothed, so that the estimates follow a machine that
others slow down.
"""

from bisect import bisect_left
from collections.abc import Callable

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
FORGETTING = 0.004  # a step: how soon what calls with guesses took is believed no more


class Pace:
    """Estimates of one engine; while somebody is writing, a call may take `max_stall_s` (None: any time).

    `in_streams`: within llama.cpp a call of sequences with unlike numbers of tokens is several.
    """

    def __init__(self, *, max_stall_s: float | None = None, in_streams: bool = False) -> None:
        self.max_stall_s = max_stall_s
        self.in_streams = in_streams
        self._writing = _Line()  # a call by its sequences, a token of each and nothing else
        # What a call takes longer by its guesses, for so many sequences, and with as many guesses for each or
        # with unlike numbers of them.
        self._extra: dict[tuple[int, bool], _Line] = {}
        self._prompt_token_s: float | None = None
        self._surprise = 1.0
        self.n_guessing = 0  # calls with guesses since one without

    def learn(
        self, *, n_writing: int, n_prompt: int, seconds: float, n_guesses: int = 0, even: bool = True
    ) -> None:
        """A call held a token of so many writing sequences, so many guesses, and tokens of prompts.

        `even`: all of the writing sequences had as many guesses.
        """
        if not n_prompt:
            self.n_guessing = self.n_guessing + 1 if n_guesses else 0
        if n_guesses and not n_prompt:
            line = self._extra.setdefault((n_writing, even or not self.in_streams), _Line(start=True))
            line.learn(n_guesses, max(0.0, seconds - self.writing_s(n_writing)))
        elif not n_prompt:
            self._writing.learn(n_writing, seconds)
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
        return self._writing.at(n_writing)

    def shares_s(self, n_writing: int) -> tuple[float, float]:
        """The same, cut in two: what a call takes by itself, and what each sequence adds to it.

        Of calls of one and of `n_writing` alone: between two numbers that are close, the times that were
        measured differ by chance.
        """
        seconds = self.writing_s(n_writing)
        more = max(0.0, seconds - self.writing_s(1))
        each = more / (n_writing - 1) if n_writing > 1 else 0.0
        return seconds - n_writing * each, each

    def guessing_s(self, n_writing: int, n_guesses: int, *, even: bool = True) -> float:
        """The same with guesses; as long as none were made, what as many tokens of more sequences take."""
        line = self._line(n_writing, even)
        extra_s = self._hoped_s(n_writing, n_guesses, even) if line is None else line.at(n_guesses)
        return self.writing_s(n_writing) + extra_s

    def doubt(self, n_writing: int) -> None:
        """No guesses pay beside so many sequences: what they took is believed a little less."""
        for even in (True, False):
            if (line := self._line(n_writing, even)) is not None:
                line.drift(lambda count, even=even: self._hoped_s(n_writing, count, even))

    def _line(self, n_writing: int, even: bool) -> "_Line | None":
        """What guesses took beside so many sequences, or the nearest number that any were made beside."""
        even = even or not self.in_streams
        known = self._extra.get((n_writing, even))
        if known is None:
            near = [count for count, same in self._extra if same == even]
            if near:
                known = self._extra[min(near, key=lambda count: abs(count - n_writing)), even]
        return known

    def _hoped_s(self, n_writing: int, n_guesses: int, even: bool) -> float:
        """What guesses may take: that of a call of their own, unless all tokens are one call."""
        if self.in_streams and not even:
            return self.writing_s(n_guesses)
        return max(0.0, self.writing_s(n_writing + n_guesses) - self.writing_s(n_writing))

    def rest_s(self, seconds: float) -> float:
        """What is left of the longest stall beside a call that will take so long; infinity: any time."""
        return float("inf") if self.max_stall_s is None else CAUTION * self.max_stall_s - seconds

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


class _Line:
    """Seconds by numbers of tokens, smoothed; between two numbers that are known on a line."""

    __slots__ = ("_counts", "_seconds")

    def __init__(self, *, start: bool = False) -> None:
        """`start`: none take nothing, and what one takes is on the line to them."""
        self._counts = [0] * start
        self._seconds = [0.0] * start

    def learn(self, count: int, seconds: float) -> None:
        """So many took so long."""
        at = bisect_left(self._counts, count)
        if at < len(self._counts) and self._counts[at] == count:
            self._seconds[at] += SMOOTHING * (seconds - self._seconds[at])
        else:
            self._counts.insert(at, count)
            self._seconds.insert(at, seconds)

    def at(self, count: int) -> float:
        """Between the two known numbers that are nearest, or beyond the last two; 0 of nothing."""
        counts, seconds = self._counts, self._seconds
        if not count or not counts:
            return 0.0
        at = bisect_left(counts, count)
        if at < len(counts) and counts[at] == count:
            return seconds[at]
        if at == 0 or len(counts) == 1:
            return seconds[0] * max(1.0, count / counts[0])
        right = min(at, len(counts) - 1)
        low, high = seconds[right - 1], seconds[right]
        slope = max(0.0, high - low) / (counts[right] - counts[right - 1])
        return low + slope * (count - counts[right - 1])

    def drift(self, hoped: Callable[[int], float]) -> None:
        """Believe a little less in what was measured and a little more in what is hoped."""
        for at, count in enumerate(self._counts):
            self._seconds[at] += FORGETTING * (hoped(count) - self._seconds[at])
