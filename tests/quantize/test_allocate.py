"""One type a tensor within a byte budget: against every mix there is, and in what it promises and refuses."""

import ast
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantize.mixes import mixing
from quantize.mixes.allocate import (
    ALLOWANCE,
    RUNNERS_UP,
    Allocation,
    BudgetTooSmall,
    Choice,
    Interactions,
    InvalidChoices,
    Mix,
    Tensor,
    allocate,
    speed_weight,
)
from quantize.mixes.interactions import estimated_shrinkage, vectors

BITS = {"Q2": 2.6, "Q3": 3.4, "Q4": 4.5, "Q4_1": 5.0, "Q5": 5.5, "Q6": 6.6, "Q8": 8.5}
#: Milliseconds a byte, odd ones for the types that are slow for their size.
SLOW = {"Q4_1": 2.0, "Q5": 1.5}
#: Nats that rounding inputs adds, for a tensor of scale 1: more in some types.
COARSE = {"Q3": 2e-4, "Q6": 1e-3}


def random_tensors(
    draw: np.random.Generator, count: int, n_types: int, *, coarse: bool = False
) -> list[Tensor]:
    """Costs fall by about a quarter a bit, as rounding errors do, with noise that puts some types behind."""
    types = sorted(draw.choice(list(BITS), n_types, replace=False), key=lambda name: BITS[name])
    tensors = []
    for index in range(count):
        weights = int(draw.choice([512, 1024, 4096, 12_288]))
        scale = draw.lognormal(0, 1.5) * weights / 4096
        choices = []
        for name in types:
            size = int(weights * BITS[name] / 8) // 32 * 32
            cost = scale * 4.0 ** -BITS[name] * draw.lognormal(0, 0.3)
            ms = size * SLOW.get(str(name), 1.0) * 1e-5
            inputs = float(scale * COARSE.get(str(name), 1e-4)) * coarse
            choices.append(Choice(str(name), size, float(cost), ms, inputs))
        tensors.append(Tensor(f"blk.{index}.weight", tuple(choices)))
    return tensors


def random_interactions(
    draw: np.random.Generator, tensors: list[Tensor], n_samples: int, *, common: float
) -> Interactions:
    """Samples whose squares give about the tensors' own costs; `common`: how much all share one direction."""
    width = max(len(tensor.choices) for tensor in tensors)
    shared = draw.normal(size=(n_samples, 1, 1))
    own = draw.normal(size=(n_samples, len(tensors), width))
    sign = draw.choice([-1.0, 1.0], (1, len(tensors), width))
    unit = np.sqrt(common) * shared * sign + np.sqrt(1 - common) * own
    costs = np.array([[choice.cost for choice in tensor.choices] for tensor in tensors])
    return Interactions(unit * np.sqrt(2 * 100 * costs), 100, shrinkage=None)


def budget_between(tensors: list[Tensor], share: float) -> int:
    least = sum(min(choice.size_bytes for choice in tensor.choices) for tensor in tensors)
    most = sum(max(choice.size_bytes for choice in tensor.choices) for tensor in tensors)
    return int(least + share * (most - least))


def every_mix(tensors: list[Tensor]) -> np.ndarray:
    return np.array(list(itertools.product(*[range(len(tensor.choices)) for tensor in tensors])))


def values(
    tensors: list[Tensor], mixes: np.ndarray, interactions: Interactions | None = None, weight: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """(bytes, worth) of mixes, by the definition; written apart from the code that is tested."""
    rows = np.arange(len(tensors))
    table = np.array([[(c.size_bytes, c.cost, c.milliseconds, c.inputs) for c in t.choices] for t in tensors])
    chosen = table[rows, mixes]
    worth = chosen[:, :, [1, 3]].sum((1, 2)) + weight * chosen[:, :, 2].sum(1)
    if interactions is not None:
        costs = table[:, :, 1]
        own = (interactions.projections**2).mean(0) / (2 * interactions.n_tokens)
        a = interactions.projections * np.sqrt(np.minimum(1, costs / own))
        picked = a[:, rows, mixes]  # (samples, mixes, tensors)
        products = picked.sum(2) ** 2 - (picked**2).sum(2)
        worth = worth + interactions.shrinkage * products.mean(0) / (2 * interactions.n_tokens)
    return chosen[:, :, 0].sum(1), worth


def largest_step(tensors: list[Tensor], weight: float) -> float:
    """What one tensor's worth may change by, at most, between two of its types."""
    worth = [[c.cost + c.inputs + weight * c.milliseconds for c in tensor.choices] for tensor in tensors]
    return max(max(each) - min(each) for each in worth)


def index_of(tensors: list[Tensor], mix: Mix) -> np.ndarray:
    names = [[choice.type for choice in tensor.choices] for tensor in tensors]
    return np.array([names[i].index(mix.types[t.name]) for i, t in enumerate(tensors)])[None]


def test_it_finds_the_best_of_all_mixes_nearly_always_and_is_never_far_from_it():
    optimal, gaps = 0, []
    for case in range(120):
        draw = np.random.default_rng(case)
        count, n_types = int(draw.integers(2, 7)), int(draw.integers(2, 6))
        tensors = random_tensors(draw, count, n_types, coarse=case % 2 == 1)
        budget = budget_between(tensors, float(draw.uniform(0, 1)))
        weight = float(draw.choice([0.0, 1e-3]))
        found = allocate(tensors, budget, weight=weight)
        size, worth = values(tensors, every_mix(tensors), weight=weight)
        best = worth[size <= budget].min()
        ours = found.best.cost + weight * found.best.milliseconds
        assert found.best.size_bytes <= budget
        optimal += ours <= best * (1 + 1e-9)
        # The relaxed problem cuts one tensor's step in two at most, so no more than a step can be missing.
        assert found.bound is not None
        assert found.bound <= best * (1 + 1e-9)
        assert ours - found.bound <= largest_step(tensors, weight) * (1 + 1e-9)
        gaps.append(ours / best - 1)
    assert optimal >= 116
    assert np.mean(gaps) < 5e-3


def test_with_interactions_it_finds_the_best_of_all_mixes_nearly_always():
    optimal, gaps = 0, []
    for case in range(80):
        draw = np.random.default_rng(case)
        tensors = random_tensors(draw, int(draw.integers(3, 7)), int(draw.integers(2, 5)))
        budget = budget_between(tensors, float(draw.uniform(0.1, 0.9)))
        measured = random_interactions(draw, tensors, 24, common=float(draw.uniform(0, 0.9)))
        given = Interactions(measured.projections, measured.n_tokens, float(draw.uniform(0.3, 1)))
        found = allocate(tensors, budget, interactions=given)
        size, worth = values(tensors, every_mix(tensors), given)
        best = worth[size <= budget].min()
        assert found.best.size_bytes <= budget
        assert found.best.cost == pytest.approx(
            values(tensors, index_of(tensors, found.best), given)[1][0], rel=1e-9, abs=1e-15
        )
        optimal += found.best.cost <= best + 1e-12
        gaps.append((found.best.cost - best) / max(best, 1e-9))
    assert optimal >= 76
    assert np.mean(gaps) < 0.01


def test_three_hundred_tensors_come_within_a_thousandth_of_what_is_possible():
    draw = np.random.default_rng(3)
    tensors = random_tensors(draw, 300, 7)
    for share in (0.05, 0.3, 0.7):
        budget = budget_between(tensors, share)
        found = allocate(tensors, budget)
        assert found.bound is not None
        assert found.best.cost <= found.bound * 1.001
        assert 0.995 * budget <= found.best.size_bytes <= budget


def test_the_same_numbers_give_the_same_mixes():
    draw = np.random.default_rng(5)
    tensors = random_tensors(draw, 20, 5)
    given = random_interactions(draw, tensors, 32, common=0.3)
    budget = budget_between(tensors, 0.4)
    assert allocate(tensors, budget, interactions=given) == allocate(tensors, budget, interactions=given)


def test_runner_ups_fit_are_ordered_and_differ_in_a_measurable_part_of_the_bytes():
    tensors = random_tensors(np.random.default_rng(6), 60, 6)
    budget = budget_between(tensors, 0.4)
    found = allocate(tensors, budget)
    mixes = [found.best, *found.runners_up]
    assert len(mixes) == 1 + RUNNERS_UP
    assert [mix.cost for mix in mixes] == sorted(mix.cost for mix in mixes)
    assert all(mix.size_bytes <= budget for mix in mixes)
    assert mixes[-1].cost < 1.25 * mixes[0].cost
    sizes = {t.name: {c.type: c.size_bytes for c in t.choices} for t in tensors}
    for one, other in itertools.combinations(mixes, 2):
        changed = [name for name in sizes if one.types[name] != other.types[name]]
        assert sum(sizes[name][other.types[name]] for name in changed) >= 0.04 * other.size_bytes


def test_no_runner_ups_are_made_up_where_there_is_one_mix():
    found = allocate([Tensor("a", (Choice("Q8", 320, 0.1),))], 320)
    assert found.best == Mix({"a": "Q8"}, 320, 0.1, 0.0)
    assert found.runners_up == ()


def test_a_larger_type_that_costs_more_is_never_chosen():
    choices = (Choice("Q4_0", 100, 0.2), Choice("Q4_1", 110, 0.3), Choice("Q8_0", 200, 0.01))
    types = {allocate([Tensor("a", choices)], budget).best.types["a"] for budget in range(100, 250, 5)}
    assert types == {"Q4_0", "Q8_0"}


def test_everything_at_its_best_where_the_budget_allows_it():
    tensors = random_tensors(np.random.default_rng(8), 30, 5)
    found = allocate(tensors, budget_between(tensors, 1.0))
    assert found.best.cost == pytest.approx(sum(min(c.cost for c in t.choices) for t in tensors))
    assert found.nats_per_byte == 0


def test_errors_that_cancel_are_preferred_to_errors_that_add_up():
    # Two tensors err alike in type A and against each other where one of them has type B.
    a = np.array([1.0, -1, 1, -1] * 8)
    b = np.array([1.0, 1, -1, -1] * 8)
    projections = np.zeros((32, 2, 2))
    projections[:, 0, 0], projections[:, 0, 1] = a, b
    projections[:, 1, 0], projections[:, 1, 1] = a, -a
    cost = 1 / (2 * 10)
    tensors = [Tensor(name, (Choice("A", 64, cost), Choice("B", 64 + 1, cost * 0.999))) for name in "xy"]
    found = allocate(tensors, 1000, interactions=Interactions(projections, 10, shrinkage=1.0))
    assert found.best.types == {"x": "A", "y": "B"}
    assert found.best.cost == pytest.approx(0, abs=1e-3)
    assert allocate(tensors, 1000).best.types == {"x": "B", "y": "B"}


def test_no_mix_is_predicted_below_zero_where_costs_are_below_the_samples_own():
    draw = np.random.default_rng(9)
    tensors = random_tensors(draw, 6, 4)
    given = random_interactions(draw, tensors, 8, common=0.95)
    halved = [
        Tensor(t.name, tuple(Choice(c.type, c.size_bytes, c.cost / 5) for c in t.choices)) for t in tensors
    ]
    full = Interactions(given.projections, given.n_tokens, 1.0)
    assert values(halved, every_mix(halved), full)[1].min() >= 0
    assert allocate(halved, budget_between(halved, 0.5), interactions=full).best.cost >= 0


def test_shrinkage_is_near_none_for_noise_and_near_one_for_what_all_samples_agree_on():
    draw = np.random.default_rng(10)
    noise = [estimated_shrinkage(draw.normal(size=(80, 128))) for _ in range(20)]
    assert np.mean(noise) < 0.05
    agreed = np.sqrt(0.9) * draw.normal(size=(1, 128)) + np.sqrt(0.1) * draw.normal(size=(80, 128))
    assert estimated_shrinkage(agreed) > 0.95


def test_shrinkage_estimates_the_share_of_the_products_that_is_real():
    draw = np.random.default_rng(11)
    n_tensors, n_samples = 60, 100
    mixing_matrix = draw.normal(size=(n_tensors, n_tensors)) * 0.1 + np.eye(n_tensors)
    truth = mixing_matrix @ mixing_matrix.T
    off = ~np.eye(n_tensors, dtype=bool)
    estimates, best = [], []
    for _ in range(30):
        samples = mixing_matrix @ draw.normal(size=(n_tensors, n_samples))
        measured = samples @ samples.T / n_samples
        estimates.append(estimated_shrinkage(samples))
        best.append((measured[off] @ truth[off]) / (measured[off] @ measured[off]))
    assert 0.2 < np.mean(best) < 0.9
    assert np.mean(estimates) == pytest.approx(np.mean(best), abs=0.05)


def test_estimated_shrinkage_gives_truly_better_mixes_than_none_and_than_full_belief():
    """Judged by the true covariance, which the allocation only sees 40 samples of."""
    totals = {0.0: 0.0, 1.0: 0.0, None: 0.0}
    for case in range(12):
        draw = np.random.default_rng(100 + case)
        tensors = random_tensors(draw, 25, 4)
        costs = np.array([[choice.cost for choice in tensor.choices] for tensor in tensors])
        directions = draw.normal(size=(25, 4, 60))
        directions[:, :, :4] *= 3
        directions *= np.sqrt(costs / (directions**2).sum(2))[:, :, None]
        samples = np.einsum("lkd,ds->slk", directions, draw.normal(size=(60, 40)))
        for shrinkage in totals:
            given = Interactions(samples * np.sqrt(2 * 100), 100, shrinkage)
            found = allocate(tensors, budget_between(tensors, 0.4), interactions=given, runners_up=0)
            chosen = directions[np.arange(25), index_of(tensors, found.best)[0]]
            totals[shrinkage] += float((chosen.sum(0) ** 2).sum() / costs.min(1).sum())
    assert totals[None] < totals[0.0]
    assert totals[None] < totals[1.0]


def test_vectors_reproduce_the_products_of_the_projections():
    draw = np.random.default_rng(12)
    tensors = random_tensors(draw, 5, 3)
    given = random_interactions(draw, tensors, 16, common=0.5)
    costs = (given.projections**2).mean(0) / (2 * given.n_tokens)
    v = vectors(given, costs)[np.arange(5), [0, 1, 2, 1, 0]]
    a = given.projections[:, np.arange(5), [0, 1, 2, 1, 0]]
    products = (a.sum(1) ** 2 - (a**2).sum(1)).mean() / (2 * given.n_tokens)
    assert (v.sum(0) ** 2).sum() - (v**2).sum() == pytest.approx(products)


def test_products_of_tensors_that_few_rows_stand_for_are_believed_less():
    draw = np.random.default_rng(12)
    tensors = random_tensors(draw, 2, 1)
    given = random_interactions(draw, tensors, 16, common=0.5)
    costs = (given.projections**2).mean(0) / (2 * given.n_tokens)
    (a, b), (c, d) = (
        vectors(replace(given, shares=shares), costs)[:, 0] for shares in (None, np.array([0.25, 0.5]))
    )
    assert c @ d == pytest.approx(a @ b * (0.25 * 0.5) ** 0.5)


def test_speed_has_a_price_and_keeps_its_allowance_of_divergence():
    tensors = random_tensors(np.random.default_rng(13), 80, 7)
    budget = budget_between(tensors, 0.5)
    found: dict[str, Allocation] = {}
    for objective in ALLOWANCE:
        found[objective] = allocate(tensors, budget, weight=speed_weight(tensors, budget, objective))
    size, balanced, speed = (found[name].best for name in ("size", "balanced", "speed"))
    assert speed.milliseconds < balanced.milliseconds < size.milliseconds
    for mix, objective in ((balanced, "balanced"), (speed, "speed")):  # swaps may go a little over
        assert size.cost < mix.cost <= 1.02 * ALLOWANCE[objective] * size.cost


def test_speed_has_no_weight_where_no_times_are_known():
    tensors = [
        Tensor(t.name, tuple(Choice(c.type, c.size_bytes, c.cost) for c in t.choices))
        for t in random_tensors(np.random.default_rng(14), 4, 3)
    ]
    assert speed_weight(tensors, budget_between(tensors, 0.5), "speed") == 0
    with pytest.raises(InvalidChoices, match="'fast' is none of size, balanced, speed"):
        speed_weight(tensors, 10**9, "fast")  # type: ignore[arg-type]


def test_a_budget_below_the_least_names_it_and_the_way_out():
    tensors = random_tensors(np.random.default_rng(15), 4, 3)
    least = budget_between(tensors, 0.0)
    assert allocate(tensors, least).best.size_bytes == least
    with pytest.raises(BudgetTooSmall, match=rf"{least} is the least .* give 1 bytes more, or allow") as info:
        allocate(tensors, least - 1)
    assert info.value.least_bytes == least


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([], "there is no tensor"),
        ([Tensor("a", ())], "tensor a has no type"),
        ([Tensor("a", (Choice("Q4", 32, 1.0),))] * 2, "tensor a is named twice"),
        ([Tensor("a", (Choice("Q4", 32, 1.0), Choice("Q4", 64, 0.5)))], "a type twice"),
        ([Tensor("a", (Choice("Q4", 0, 1.0),))], "tensor a as Q4 has 0 bytes"),
        ([Tensor("a", (Choice("Q4", 32, float("nan")),))], "tensor a as Q4: cost is nan"),
        ([Tensor("a", (Choice("Q4", 32, -1.0),))], "cost is -1.0; give a number, 0 or more"),
        ([Tensor("a", (Choice("Q4", 32, 1.0, float("inf")),))], "milliseconds is inf"),
    ],
)
def test_numbers_that_make_no_sense_are_refused_by_name(tensors, message):
    with pytest.raises(InvalidChoices, match=message):
        allocate(tensors, 10**6)


def test_projections_that_do_not_fit_the_tensors_are_refused():
    tensors = [Tensor(name, (Choice("Q4", 32, 1.0), Choice("Q8", 64, 0.1))) for name in "ab"]
    good = np.ones((3, 2, 2))
    for projections, message in (
        (np.ones((3, 2, 1)), r"projections are \[3, 2, 1\]; give \(samples, 2 tensors, 2 choices\)"),
        (np.ones((3, 2)), r"projections are \[3, 2\]"),
        (np.ones((0, 2, 2)), r"projections are \[0, 2, 2\]"),
        (np.where(np.arange(12).reshape(3, 2, 2) == 3, np.nan, 1.0), "of tensor b hold numbers that are not"),
    ):
        with pytest.raises(InvalidChoices, match=message):
            allocate(tensors, 200, interactions=Interactions(projections, 10))
    with pytest.raises(InvalidChoices, match="n_tokens is 0"):
        allocate(tensors, 200, interactions=Interactions(good, 0))
    with pytest.raises(InvalidChoices, match=r"shrinkage is 1.5; give a number from 0 to 1"):
        allocate(tensors, 200, interactions=Interactions(good, 10, 1.5))
    with pytest.raises(InvalidChoices, match="weight is -1"):
        allocate(tensors, 200, weight=-1)


def test_the_front_keeps_what_no_other_choice_beats():
    sizes, worth = np.array([30, 10, 20, 20, 40]), np.array([2.0, 5.0, 3.0, 4.0, 2.0])
    assert mixing.front(sizes, worth).tolist() == [1, 2, 0]


@pytest.mark.parametrize("name", ["allocate", "mixing", "interactions"])
def test_it_knows_no_files_no_models_and_no_clock(name):
    tree = ast.parse((Path(__file__).parents[2] / "quantize" / "mixes" / f"{name}.py").read_text("utf-8"))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    found |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    ours = {
        "quantize",
        "quantize.mixes",
        "quantize.errors",
        "quantize.mixes.interactions",
        "quantize.mixes.mixing",
    }
    assert found <= {"numpy", "dataclasses", "collections.abc", "typing", *ours}
