"""Of prompts that begin alike the oldest computes the common part; the others wait and go on from there.

Where attention slides a window, only the whole of what somebody holds can be copied: a leader stops where its
followers go on until they have it. Pure.
"""

from collections.abc import Iterable

from engine.prefix import common_prefix
from engine.sequence import Sequence

MIN_SHARED = 32  # tokens worth waiting for until another sequence has computed them


def leader_of(
    sequence: Sequence, length: int, by_age: Iterable[Sequence], *, cost: int, stops: bool
) -> tuple[Sequence | None, int]:
    """Whom to follow for more than the first `length` tokens, and for how many; the oldest first.

    `cost`: of a copy, in tokens; `stops`: a leader must stop there, and so not have gone on already.
    """
    leader, n_shared = None, length + max(MIN_SHARED - 1, cost)
    wanted = sequence.tokens[:-1]  # the logits of the last one are needed
    for older in by_age:
        if older is sequence or len(wanted) <= n_shared:
            break
        if older.leader is not None or older.is_writing or older.namespace != sequence.namespace:
            continue
        # Where one more than the best so far is the same, and only there, the whole is compared.
        more = n_shared + 1
        if older.tokens[n_shared:more] == wanted[n_shared:more] and older.tokens[:more] == wanted[:more]:
            common = common_prefix(older.tokens, wanted)
            if not stops or older.n_computed < common:
                leader, n_shared = older, common
    return leader, n_shared


def may_join(sequence: Sequence) -> bool:
    """Whether the leader has computed the common part, or has ended before."""
    leader = sequence.leader
    return leader is not None and (leader.slot is None or leader.n_computed >= sequence.n_shared)


def stops(group: list[Sequence]) -> dict[Sequence, int]:
    """How far those may compute in one call whom others follow."""
    ends: dict[Sequence, int] = {}
    for each in group:
        leader = each.leader
        if leader is not None and leader.n_computed < each.n_shared:
            ends[leader] = min(ends.get(leader, each.n_shared), each.n_shared)
    return ends
