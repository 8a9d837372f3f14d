"""What of the running sequences is in the next call, and how many tokens of each.

Every writing sequence gets its one token in every call, and guesses behind it when it has some; the rest of
the call is filled with prompts, up to the size that the loop allows while others are writing.

But somebody may run more than its share of the slots, reckoned with every tenant that came lately. It runs on
what is others', and those must not wait for it when they come again, so it gives way:
- It guesses nothing, and calls that compute prompts of its own are brief.
- Prompts of who is within its share go before its own, in a call without it. Who writes misses no more by
  that than beside any other prompt, since the tokens of all calls that it misses count together.
- Prompts and those who write take turns: who comes waits for one of both, not for their sum.
Only where tenants are several is anybody over its share. Pure.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from engine.fairness import FairQueue
from engine.leaders import stops
from engine.rotation import MIN_PORTION
from engine.sequence import Chunk, Sequence


@dataclass(frozen=True, slots=True)
class Limits:
    """Tokens of prompts; None: as many as there is room for.

    `prompt`: between two calls of a sequence that writes, None when nobody does (rotation.py says how much of
    it a call may have); `brief`: in a call of those over their share.
    """

    prompt: int | None = None
    brief: int | None = None


@dataclass(frozen=True, slots=True)
class _Members:
    """Of the next call: who writes, and whose prompts in which order, `portion` tokens together."""

    writers: list[Sequence]
    prompts: list[Sequence]
    portion: int | None


class Turns:
    """Remembers whose turn it was."""

    def __init__(self, queue: FairQueue[Sequence], *, n_slots: int, leaders_stop: bool = False) -> None:
        """`leaders_stop`: where their followers go on, until those have what the leaders hold."""
        self._queue = queue
        self._stops = leaders_stop
        self._n_slots = n_slots
        self._gave_way = False  # the last prompts were of others than who is over its share

    def is_over_share(self, sequence: Sequence) -> bool:
        """Whether the sequence's tenant runs on slots that others may want back at any time."""
        return self._queue.is_over_share(sequence, self._n_slots)

    def chunks(
        self,
        group: list[Sequence],
        running: list[Sequence],
        *,
        room: int,
        limits: Limits,
        drafts: Mapping[Sequence, list[int]],
    ) -> list[Chunk]:
        """The next call of a group of those that run, `room` tokens at most.

        `limits`: of this call; `drafts`: guesses of who writes.
        """
        everybody = [each for each in group if each.is_writing]
        now = self._members(group, everybody, limits)
        room -= len(everybody) - len(now.writers)  # the cells of their next tokens
        chunks = _written(now.writers, room, drafts)
        if now.prompts:
            room -= sum(len(chunk.tokens) for chunk in chunks)
            portion = room if now.portion is None else min(room, now.portion)
            most = room if len(group) == len(running) else portion  # of each set it would be a fifth more
            chunks += _portions(now.prompts, stops(group) if self._stops else {}, portion, most)
        _count_missed(running, everybody, chunks)
        return chunks

    def _members(self, group: list[Sequence], writers: list[Sequence], limits: Limits) -> _Members:
        prompts = self._in_order(group) if limits.prompt != 0 else []
        over = self._over(group)
        if not over or not prompts:
            return _Members(writers, prompts, limits.prompt)
        within = [each for each in prompts if each not in over]
        first = prompts[0]
        if first in over:  # it goes first if it did not before, or before nobody but those of lower priority
            within = [each for each in within if each.tenant.priority >= first.tenant.priority]
            within = [] if self._gave_way else within
        left = limits.prompt
        missed_a_turn = any(each.gave_way for each in writers)
        if missed_a_turn and (not within or left is None or left < MIN_PORTION):
            return _Members(writers, [], None)
        self._gave_way = bool(within)
        if within:
            return _Members([each for each in writers if each not in over], within, left)
        portion = min((each for each in (limits.brief, left) if each is not None), default=None)
        return _Members([], [each for each in prompts if each in over], portion)

    def _in_order(self, group: list[Sequence]) -> list[Sequence]:
        """Prompts in the queue's order, then the oldest; a leader has the best rank of those behind it."""
        ranks = {each: (*self._queue.rank(each), each.age) for each in group}
        for each in group:
            leader = each.leader
            while leader is not None and leader in ranks:
                ranks[leader] = min(ranks[leader], ranks[each])
                leader = leader.leader
        return sorted(
            (each for each in group if not each.is_writing and not each.leader), key=ranks.__getitem__
        )

    def _over(self, group: list[Sequence]) -> set[Sequence]:
        """Sequences of tenants over their share, but for those that others wait for."""
        over = {each for each in group if self.is_over_share(each)}
        if over:
            over -= {each.leader for each in group if each.leader and each not in over}
        return over


def _written(writers: list[Sequence], room: int, drafts: Mapping[Sequence, list[int]]) -> list[Chunk]:
    """One token of each, and behind it as many guesses as there is room for."""
    spare = room - len(writers)
    chunks = []
    for each in writers:
        guesses = drafts.get(each, [])[: max(0, min(spare, each.n_behind_next))]
        spare -= len(guesses)
        tokens = [each.tokens[-1], *guesses]
        chunks.append(
            Chunk(each, tokens, each.n_computed, samples=True, n_draft=len(guesses), is_writing=True)
        )
    return chunks


def _portions(prompts: list[Sequence], ends: Mapping[Sequence, int], room: int, most: int) -> list[Chunk]:
    """As much of the prompts, up to the ends of some, as there is room for.

    `room` may be exceeded by a fifth, within `most`, if that spares a call for the rest of a prompt.
    """
    chunks = []
    for each in prompts:
        if room <= 0:
            break
        start, missing = each.n_computed, ends.get(each, len(each.tokens)) - each.n_computed
        length = missing if missing <= min(most, room + room // 5) else room
        end = start + length
        chunks.append(Chunk(each, each.tokens[start:end], start, samples=end == len(each.tokens)))
        room, most = room - length, most - length
    return chunks


def _count_missed(running: list[Sequence], writers: list[Sequence], chunks: list[Chunk]) -> None:
    """Note what all who write had to wait for, and which of the group's own `writers` are not in the call."""
    n_prompt = sum(len(chunk.tokens) for chunk in chunks if not chunk.is_writing)
    present = {chunk.sequence for chunk in chunks}
    for each in running:
        if each in present:
            each.n_missed = 0
        elif each.is_writing:
            each.n_missed += n_prompt
    for each in writers:
        each.gave_way = each not in present
