"""Choose which sequences join the next llama_decode call.

Pure bookkeeping: no C calls, no text, no clock. The loop asks, the scheduler answers.

A slot is one sequence id of the KV memory, a stream of n_ctx cells. It holds the tokens whose cells are
computed, also after its request has ended, so that a later request can go on from them or copy them. Memory
can never run out: no sequence grows past n_ctx.

The policy: requests are admitted in order of arrival, each running sequence gets its one token in every
call, and the rest of the call is filled with the oldest prompts. While others are decoding, the prompt
tokens of a call are at most `n_shared_chunk`, so that a long prompt slows their streams but never stops them.
Of prompts that begin alike, the oldest computes the common part; the others wait for it and copy its cells,
where that is worth it.
"""

from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field

from engine.prefix import Match, common_prefix, longest_match

MIN_SHARED = 32  # tokens worth waiting for until another sequence has computed them


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way: its prompt, what it wrote, and how far its cells are computed."""

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int  # new tokens, at least 1; prompt and new tokens together fit n_ctx
    written: list[int] = field(default_factory=list)
    n_computed: int = 0  # tokens of prompt + written that have cells
    n_cached: int = 0  # of the prompt, found in the cache at admission
    slot: int | None = None
    leader: "Sequence | None" = None  # computes the first n_shared tokens of this prompt
    n_shared: int = 0

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.written)

    @property
    def is_decoding(self) -> bool:
        return bool(self.written)

    def pending(self, limit: int) -> list[int]:
        """The next tokens without cells, at most `limit`."""
        if self.written:
            return [self.written[-1]]
        return list(self.prompt[self.n_computed : self.n_computed + limit])


@dataclass(frozen=True, slots=True)
class Admission:
    """Begin a sequence's slot with `length` tokens of slot `source`, and forget all else it holds."""

    sequence: Sequence
    source: int
    length: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence for the next call; the last one's logits are needed if `samples`."""

    sequence: Sequence
    tokens: list[int]
    start: int  # position of the first
    samples: bool


@dataclass(slots=True)
class Slot:
    """What one sequence id of the KV memory holds."""

    tokens: list[int] = field(default_factory=list)
    sequence: Sequence | None = None
    last_used: int = 0


class Scheduler:
    """Waiting requests, running sequences and what the slots remember."""

    def __init__(
        self,
        *,
        n_slots: int,
        n_batch: int,
        n_shared_chunk: int | None = None,
        share_prefixes: bool = True,
        n_window: int = 0,
        n_copy_min: int = 1,
    ) -> None:
        """`n_copy_min`: tokens from which on taking a prefix from another slot is worth its copy.

        `n_window`: the tokens that attention looks back on in some layers; 0 for all. Cells that a
        sequence's window has left behind may be overwritten, so that only what reaches to the end of a
        slot, or a slot shorter than the window, can be shared.
        """
        self.n_batch = n_batch
        self.n_shared_chunk = n_shared_chunk or max(1, n_batch // 4)
        self.share_prefixes = share_prefixes
        self.n_window = n_window
        self.n_copy_min = n_copy_min
        self.waiting: deque[Sequence] = deque()
        self.slots = [Slot() for _ in range(n_slots)]
        self._turn = 0

    @property
    def running(self) -> list[Sequence]:
        """Admitted sequences, in slot order, which stays the same from call to call."""
        return [slot.sequence for slot in self.slots if slot.sequence is not None]

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.waiting and not self.running

    @property
    def only_writes(self) -> bool:
        """Whether every sequence that can be in the next call is past its prompt."""
        slots = self.slots
        if self.waiting and any(slot.sequence is None for slot in slots):
            return False
        return all(slot.sequence is None or slot.sequence.written for slot in slots)

    def n_waiting_with(self, more: int) -> int:
        """Requests that would wait for a slot at the next call if `more` came."""
        free = sum(slot.sequence is None for slot in self.slots)
        return max(0, len(self.waiting) + more - free)

    def add(self, sequence: Sequence) -> None:
        """Queue a request."""
        self.waiting.append(sequence)

    def admit(self) -> list[Admission]:
        """Let followers have what was computed for them, and give free slots to waiting requests in order."""
        admissions: list[Admission] = []
        if any(slot.sequence is not None and slot.sequence.leader for slot in self.slots):
            admissions += [
                self._join(each) for each in self._by_age() if each.leader and self._may_join(each)
            ]
        while self.waiting and any(slot.sequence is None for slot in self.slots):
            admissions.append(self._place(self.waiting.popleft()))
        return admissions

    def plan(self) -> list[Chunk]:
        """The next call: one token of every decoding sequence, then prompt chunks up to the call's size."""
        running = self.running
        chunks = [self._chunk(sequence, 1) for sequence in running if sequence.is_decoding]
        room = self.n_batch - len(chunks)
        if len(chunks) == len(running):
            return chunks
        if chunks:
            room = min(room, self.n_shared_chunk)
        for sequence in self._by_age():
            if room <= 0:
                break
            if sequence.is_decoding or sequence.leader:
                continue
            chunk = self._chunk(sequence, room)
            chunks.append(chunk)
            room -= len(chunk.tokens)
        return chunks

    def computed(self, chunk: Chunk) -> None:
        """A chunk of the plan was decoded: its tokens have cells now."""
        sequence = chunk.sequence
        sequence.n_computed += len(chunk.tokens)
        self._slot(sequence).tokens.extend(chunk.tokens)

    def wrote(self, sequence: Sequence, token: int) -> bool:
        """A token was sampled; returns whether the sequence may write another."""
        sequence.written.append(token)
        return len(sequence.written) < sequence.max_tokens

    def release(self, sequence: Sequence, *, forget: bool = False) -> None:
        """End a sequence, running or waiting; its slot keeps the computed tokens unless `forget`."""
        if sequence.slot is None:
            self.waiting.remove(sequence)
            return
        slot = self._slot(sequence)
        slot.sequence = None
        sequence.slot = None
        if forget or not self.share_prefixes:
            slot.tokens.clear()

    def _slot(self, sequence: Sequence) -> Slot:
        assert sequence.slot is not None
        return self.slots[sequence.slot]

    def _by_age(self) -> list[Sequence]:
        """Running sequences, the first admitted first."""
        return sorted(self.running, key=lambda sequence: self._slot(sequence).last_used)

    def _chunk(self, sequence: Sequence, limit: int) -> Chunk:
        tokens = sequence.pending(limit)
        reaches_end = sequence.n_computed + len(tokens) == sequence.n_tokens
        return Chunk(sequence, tokens, sequence.n_computed, reaches_end)

    def _place(self, sequence: Sequence) -> Admission:
        """Choose the slot: the idle one that holds the match, else the one whose tokens are worth least."""
        free = [index for index, slot in enumerate(self.slots) if slot.sequence is None]
        match = self._match(sequence)
        target = self._target(free, match)
        if match and match.slot != target and match.length < self.n_copy_min:
            match = None
        self._turn += 1
        slot = self.slots[target]
        slot.sequence, slot.last_used, sequence.slot = sequence, self._turn, target
        self._follow(sequence, match.length if match else 0)
        return self._begin(sequence, match)

    def _begin(self, sequence: Sequence, match: Match | None) -> Admission:
        """Record that the slot holds what it shares, and nothing else."""
        assert sequence.slot is not None
        source, length = (match.slot, match.length) if match else (sequence.slot, 0)
        self._slot(sequence).tokens = list(sequence.prompt[:length])
        sequence.n_computed = sequence.n_cached = length
        return Admission(sequence, source, length)

    def _match(self, sequence: Sequence) -> Match | None:
        """The longest prefix that a slot holds, less the prompt's last token: its logits are needed."""
        if not self.share_prefixes:
            return None
        held = {index: tuple(slot.tokens) for index, slot in enumerate(self.slots) if slot.tokens}
        if self.n_window:
            n_usable = len(sequence.prompt) - 1
            held = {
                index: tokens
                for index, tokens in held.items()
                if len(tokens) < self.n_window
                or (len(tokens) <= n_usable and sequence.prompt[: len(tokens)] == tokens)
            }
        return longest_match(sequence.prompt[:-1], held)

    def _follow(self, sequence: Sequence, length: int) -> None:
        """Find an older prompt, still being computed, that will hold more of this one than `length`."""
        sequence.leader, sequence.n_shared = None, length + max(MIN_SHARED, self.n_copy_min) - 1
        if not self.share_prefixes or self.n_window:
            return
        for older in self._by_age():
            if older is sequence:
                return
            if older.leader is None and not older.is_decoding:
                shared = common_prefix(sequence.prompt[:-1], older.prompt)
                if shared > sequence.n_shared:
                    sequence.leader, sequence.n_shared = older, shared

    def _may_join(self, sequence: Sequence) -> bool:
        """Whether the leader has computed the common part, or has ended before."""
        leader = sequence.leader
        return leader is not None and (leader.slot is None or leader.n_computed >= sequence.n_shared)

    def _join(self, sequence: Sequence) -> Admission:
        """Take what there is now if that is worth its copy, and look for the next leader."""
        assert sequence.slot is not None
        match = self._match(sequence)
        if match is None or match.length < sequence.n_computed + self.n_copy_min:
            match = Match(sequence.slot, sequence.n_computed)
        self._follow(sequence, match.length)
        return self._begin(sequence, match)

    def _target(self, free: list[int], match: Match | None) -> int:
        if match and match.slot in free and 2 * match.length >= len(self.slots[match.slot].tokens):
            return match.slot  # most of what it holds is used again: no copy, nothing lost
        empty = [index for index in free if not self.slots[index].tokens]
        others = [index for index in free if match is None or index != match.slot] or free
        return empty[0] if empty else min(others, key=lambda index: self.slots[index].last_used)
