"""Who holds the longest prefix: the tree against plain comparison of everything with everything."""

import random

import pytest

from engine.prefix import PrefixTree, common_prefix
from tests.engine.fakes import check_tree


@pytest.mark.parametrize(
    ("left", "right", "length"),
    [
        ([], [], 0),
        ([], [1], 0),
        ([1], [2], 0),
        ([1], [1], 1),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 2, 4], 2),
        ([1, 2, 3, 4, 5, 6, 7], [1, 9, 3, 4, 5, 6, 7], 1),
    ],
)
def test_common_prefix_counts_equal_leading_tokens(left, right, length):
    assert common_prefix(left, right) == length


def test_common_prefix_equals_the_plain_count_on_random_pairs():
    chance = random.Random(1)
    for _ in range(2000):
        left = [chance.randrange(2) for _ in range(chance.randrange(12))]
        right = [chance.randrange(2) for _ in range(chance.randrange(12))]
        offset = chance.randrange(len(right) + 1)
        assert common_prefix(left, right, offset) == plain_common(left, right[offset:])


def plain_common(left, right) -> int:
    count = 0
    while count < min(len(left), len(right)) and left[count] == right[count]:
        count += 1
    return count


def tree(**held: list[int]) -> PrefixTree:
    made = PrefixTree()
    for holder, tokens in held.items():
        made.hold(holder, tokens)
    check_tree(made)
    return made


def found(matches) -> list[tuple[int, set]]:
    return [(match.length, set(match.holders)) for match in matches]


def test_the_longest_prefix_comes_first_with_all_who_hold_it():
    made = tree(a=[1, 2], b=[1, 2, 3], c=[1, 2, 3, 9])
    assert found(made.matches([1, 2, 3, 4])) == [(3, {"b", "c"}), (2, {"a", "b", "c"})]
    assert found(made.matches([1, 5])) == [(1, {"a", "b", "c"})]
    assert made.matches([7]) == made.matches([]) == []


def test_what_a_holder_adds_is_found_at_once():
    made = tree(a=[1, 2], b=[1, 2])
    made.extend("a", [3])
    made.extend("a", [4])
    made.extend("new", [1, 2, 3])
    check_tree(made)
    assert found(made.matches([1, 2, 3, 4]))[0] == (4, {"a"})
    assert found(made.matches([1, 2, 3]))[0] == (3, {"a", "new"})


def test_who_holds_something_else_now_is_not_found_under_the_old():
    made = tree(a=[1, 2, 3])
    made.hold("a", [4])
    check_tree(made)
    assert made.matches([1, 2, 3]) == []
    made.release("a")
    made.release("never there")
    assert "a" not in made
    assert made.matches([4]) == []


def test_namespaces_never_meet():
    made = PrefixTree()
    made.hold("a", [1, 2], "salt")
    made.hold("b", [1, 2])
    assert found(made.matches([1, 2], "salt")) == [(2, {"a"})]
    assert found(made.matches([1, 2])) == [(2, {"b"})]
    assert made.matches([1, 2], "other") == []


def test_tokens_that_nobody_else_holds_are_counted():
    made = tree(a=[1, 2, 3, 4], b=[1, 2], c=[9])
    assert (made.n_alone("a"), made.n_alone("b"), made.n_alone("c"), made.n_alone("?")) == (2, 0, 1, 0)
    made.release("b")
    assert made.n_alone("a") == 4


@pytest.mark.parametrize("seed", range(30))
def test_the_tree_agrees_with_plain_comparison(seed):
    chance = random.Random(seed)
    made, held = PrefixTree(), {}
    for _ in range(400):
        holder, space = chance.randrange(8), chance.randrange(2)
        tokens = [chance.randrange(2) for _ in range(chance.randrange(12))]
        match chance.randrange(3):
            case 0:
                made.hold(holder, tokens, space)
                held[holder] = (space, tokens)
            case 1 if held.get(holder, (None, []))[1]:
                made.extend(holder, tokens)
                held[holder] = (held[holder][0], held[holder][1] + tokens)
            case 2:
                made.release(holder)
                held.pop(holder, None)
        check_tree(made)
        wanted = [chance.randrange(2) for _ in range(14)]
        for where in (0, 1):
            shared = {
                holder: plain_common(wanted, tokens)
                for holder, (space, tokens) in held.items()
                if space == where
            }
            best = max(shared.values(), default=0)
            matches = made.matches(wanted, where)
            assert (matches[0].length if matches else 0) == best
            for match in matches:
                assert match.holders == {each for each, length in shared.items() if length >= match.length}


def test_holders_that_write_the_same_text_in_step_leave_one_node():
    made = PrefixTree()
    for holder in "ab":
        made.hold(holder, [1, 2, 3])
    for token in range(4, 50):
        for holder in "ab":
            made.extend(holder, [token])
    (node,) = made._roots[None].children.values()
    assert (node.tokens, node.children) == (list(range(1, 50)), {})
    made.extend("a", [50, 51])
    made.extend("b", [50, 52])
    made.release("b")
    assert made._roots[None].children[1].tokens == list(range(1, 52))
    assert made.n_alone("a") == 51
