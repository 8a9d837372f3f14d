"""What the scheduler moves about: sequences, slots, and the steps that bring the KV memory where it wants it.

Plain records; the decisions are scheduler.py's, the native calls loop.py's.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

from engine.fairness import Charged
from engine.request import Tenant
from engine.stash import Copy, Demote, Discard, State, Tier

CachedTier = Literal["slot"] | Tier


@dataclass(eq=False, slots=True)
class Sequence:
    """One request on its way: its prompt, what it wrote, and how far its cells are computed."""

    id: Hashable
    prompt: tuple[int, ...]
    max_tokens: int  # new tokens, at least 1; prompt and new tokens together fit n_ctx
    tenant: Charged = field(default_factory=Tenant)
    namespace: Hashable = None  # prefixes are shared within
    adapters: Hashable = ()  # decoded together with sequences of the same
    tokens: list[int] = field(default_factory=list)  # prompt and what was written
    n_computed: int = 0  # tokens that have cells
    n_cached: int | None = None  # of the prompt, found in the cache at the first admission
    cached_tier: CachedTier = "slot"  # where those were
    age: int = 0  # when it was admitted last; the youngest makes way first
    slot: int | None = None
    state: State | None = None  # what was saved when it had to make way
    leader: "Sequence | None" = None  # computes the first n_shared tokens of this prompt
    n_shared: int = 0
    n_missed: int = 0  # tokens of others' prompts, computed in calls without this one since it wrote last
    gave_way: bool = False  # the last call of its adapters was without it, though it writes

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def n_written(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def written(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def n_behind_next(self) -> int:
        """Tokens that may be written behind the next one: more guesses than these are of no use."""
        return self.max_tokens - self.n_written - 1

    @property
    def n_unread(self) -> int:
        """Tokens that it has yet to compute before it writes, but for those that its leader does."""
        if self.is_writing:
            return 0
        return len(self.tokens) - (self.n_computed if self.leader is None else self.n_shared)

    @property
    def is_writing(self) -> bool:
        """Whether all but the token written last has cells."""
        return len(self.tokens) - self.n_computed == 1 and len(self.tokens) > len(self.prompt)


@dataclass(slots=True)
class Slot:
    """What one sequence id of the KV memory holds, running or idle."""

    tokens: list[int] = field(default_factory=list)
    namespace: Hashable = None
    sequence: Sequence | None = None
    n_brought: int = 0  # of the tokens: copied or restored, without what their window had left behind
    backed_up: int = 0  # its last use when it was last looked at for a copy on disk


@dataclass(frozen=True, slots=True)
class Begin:
    """A slot holds the first `length` tokens of `source` (a slot, a state, None), and no more."""

    sequence: Sequence
    slot: int
    source: "int | State | None"
    length: int


@dataclass(frozen=True, slots=True)
class Save:
    """Copy the first tokens of a slot, as many as the state has, to host memory."""

    slot: int
    state: State


@dataclass(frozen=True, slots=True)
class Drop:
    """Forget all that a slot holds."""

    slot: int


Action = Begin | Save | Drop | Copy | Demote | Discard


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence for the next call, the last `n_draft` of them guesses.

    `samples`: the logits are needed after the last token that is no guess, and after every guess.
    """

    sequence: Sequence
    tokens: list[int]
    start: int  # position of the first
    samples: bool
    n_draft: int = 0
    is_writing: bool = False  # else it is of a prompt, or of what is computed once more


@dataclass(frozen=True, slots=True)
class Plan:
    """The next call; the actions come before it."""

    chunks: list[Chunk]
    actions: list[Action]
    adapters: Hashable = ()
