"""The count of cells against plain sets of cells."""

import random

import pytest

from engine.cells import Cells


def test_a_shared_prefix_takes_its_cells_once():
    cells = Cells(100, 3)
    cells.append(0, 30)
    cells.share(0, 1, 20)
    cells.append(1, 5)
    assert (cells.n_used, cells.n_free, cells.n_shared) == (35, 65, 20)
    assert (cells.n_alone([0]), cells.n_alone([1]), cells.n_alone([0, 1])) == (10, 5, 35)


def test_cells_are_free_when_the_last_holder_lets_go():
    cells = Cells(100, 2)
    cells.append(0, 30)
    cells.share(0, 1, 30)
    cells.cut(0, 0)
    assert cells.n_used == 30
    cells.cut(1, 10)
    assert cells.n_used == 10
    cells.cut(1, 0)
    assert cells.n_used == 0


@pytest.mark.parametrize("seed", range(50))
def test_any_order_of_operations_counts_as_sets_do(seed):
    chance = random.Random(seed)
    n = 4
    cells, plain, fresh = Cells(10**6, n), [[] for _ in range(n)], 0
    for _ in range(300):
        one, other = chance.randrange(n), chance.randrange(n)
        match chance.randrange(3):
            case 0:
                count = chance.randrange(6)
                cells.append(one, count)
                plain[one] += range(fresh, fresh + count)
                fresh += count
            case 1:
                length = chance.randint(0, len(plain[one]))
                cells.cut(one, length)
                del plain[one][length:]
            case 2 if one != other:
                length = chance.randint(0, len(plain[one]))
                cells.share(one, other, length)
                plain[other] = plain[one][:length]
        everything = [cell for held in plain for cell in held]
        assert cells.n_used == len(set(everything))
        assert cells.n_shared == sum(everything.count(cell) > 1 for cell in set(everything))
        for index in range(n):
            assert cells.n_held(index) == len(plain[index])
            assert cells.n_alone([index]) == sum(everything.count(cell) == 1 for cell in plain[index])
        others = {cell for index in (2, 3) for cell in plain[index]}
        assert cells.n_alone([0, 1]) == len({*plain[0], *plain[1]} - others)
