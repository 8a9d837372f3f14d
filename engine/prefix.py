"""Which cached tokens serve these tokens: a radix tree over everything that is held anywhere.

A holder is whatever has computed tokens: a slot of the KV memory, or a state saved in host memory or on disk.
Each holds one run of tokens from position 0. Runs of different namespaces never meet: another salt, another
adapter. Pure: token lists in, lengths and holders out.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Node:
    """Some tokens behind its parent's; `holders` hold all of them."""

    tokens: list[int]
    parent: "Node | None"
    children: dict[int, "Node"] = field(default_factory=dict)  # by their first token
    holders: set[Hashable] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Match:
    """`holders` have the first `length` of the tokens that were looked for."""

    length: int
    holders: frozenset[Hashable]


class PrefixTree:
    """Holders by their tokens; adding to the end of a holder's costs next to nothing."""

    def __init__(self) -> None:
        self._roots: dict[Hashable, Node] = {}
        self._ends: dict[Hashable, Node] = {}  # where a holder's tokens end
        self._namespaces: dict[Hashable, Hashable] = {}

    def __contains__(self, holder: Hashable) -> bool:
        return holder in self._ends

    def hold(self, holder: Hashable, tokens: Sequence[int], namespace: Hashable = None) -> None:
        """From now on the holder has these tokens and no others."""
        self.release(holder)
        if tokens:
            root = self._roots.get(namespace)
            if root is None:
                root = self._roots[namespace] = Node([], None)
            self._namespaces[holder] = namespace
            self._ends[holder] = self._descend(root, holder, tokens)

    def extend(self, holder: Hashable, tokens: Sequence[int], namespace: Hashable = None) -> None:
        """The holder has more tokens, behind those it had."""
        end = self._ends.get(holder)
        if end is None:
            self.hold(holder, tokens, namespace)
        elif len(end.holders) == 1 and not end.children:
            end.tokens.extend(tokens)
        else:
            self._ends[holder] = self._descend(end, holder, tokens)
            self._absorb(end)  # holders that write the same text in step leave no node for each token

    def release(self, holder: Hashable) -> None:
        """The holder has nothing any more."""
        node = self._ends.pop(holder, None)
        if node is None:
            return
        namespace = self._namespaces.pop(holder)
        while node.parent is not None:
            parent = node.parent
            node.holders.discard(holder)
            if not node.holders:
                del parent.children[node.tokens[0]]
            else:
                self._absorb(node)
            node = parent
        if not node.children:
            del self._roots[namespace]

    def matches(self, tokens: list[int], namespace: Hashable = None) -> list[Match]:
        """Every length at which the holders change, the longest first."""
        found: list[Match] = []
        node, at = self._roots.get(namespace), 0
        while node is not None and at < len(tokens):
            node = node.children.get(tokens[at])
            if node is None:
                break
            shared = common_prefix(node.tokens, tokens, at)
            at += shared
            found.append(Match(at, frozenset(node.holders)))
            if shared < len(node.tokens):
                break
        return found[::-1]

    def n_alone(self, holder: Hashable) -> int:
        """Tokens at the end of the holder's that nobody else holds."""
        node, count = self._ends.get(holder), 0
        while node is not None and node.parent is not None and len(node.holders) == 1:
            count += len(node.tokens)
            node = node.parent
        return count

    def _descend(self, node: Node, holder: Hashable, tokens: Sequence[int]) -> Node:
        """Add a holder along a path below `node`, making and cutting nodes as needed; its end."""
        rest = list(tokens)
        at = 0
        while at < len(rest):
            child = node.children.get(rest[at])
            if child is None:
                child = Node(rest[at:], node, holders={holder})
                node.children[rest[at]] = child
                return child
            shared = common_prefix(child.tokens, rest, at)
            if shared < len(child.tokens):
                child = self._cut(child, shared)
            child.holders.add(holder)
            node, at = child, at + shared
        return node

    def _cut(self, node: Node, length: int) -> Node:
        """Split a node's tokens in two; the new upper node. Holders that end at the node still do."""
        parent = node.parent
        assert parent is not None
        upper = Node(node.tokens[:length], parent, {node.tokens[length]: node}, set(node.holders))
        parent.children[upper.tokens[0]] = upper
        del node.tokens[:length]
        node.parent = upper
        return upper

    def _absorb(self, node: Node) -> None:
        """Join a node with its only child when the same holders go through both."""
        if len(node.children) != 1:
            return
        (child,) = node.children.values()
        if child.holders != node.holders:
            return
        node.tokens += child.tokens
        node.children = child.children
        for grandchild in node.children.values():
            grandchild.parent = node
        for holder in child.holders:
            if self._ends[holder] is child:
                self._ends[holder] = node


def common_prefix(left: list[int], right: list[int], offset: int = 0) -> int:
    """Leading tokens that `left` and right[offset:] share; compares by halving slices, so in C."""
    low, high = 0, min(len(left), len(right) - offset)
    if left[:high] == right[offset : offset + high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if left[low:middle] == right[offset + low : offset + middle]:
            low = middle
        else:
            high = middle
    return low
