"""What the serving benchmark's clients ask: texts of stated sizes, plans that can be repeated."""

from random import Random

import pytest

from benchmarks.serving.__main__ import parsed, scenario_names
from benchmarks.serving.catalogue import SCENARIOS
from benchmarks.serving.figures import FIGURES
from benchmarks.serving.scenarios import arrivals, oversubscribed
from benchmarks.serving.texts import Texts


def count_words(text: str) -> int:
    """A tokenizer whose tokens are words and the digits of numbers, as most vocabularies have them."""
    return sum(len(word) if word.isdigit() else 1 for word in text.replace(".", " .").split())


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts.sized(count_words)


def first_words(clients) -> set[str]:
    """How the texts that requests begin with begin."""
    return {client.turns[0].messages[0]["content"][:16] for client in clients}


@pytest.mark.parametrize("tokens", [60, 250, 1500, 6000])
def test_a_text_has_the_size_that_was_asked_for(texts, tokens):
    written = texts.take(Random(1), tokens)
    assert abs(count_words(written) - tokens) <= 1


def test_a_fresh_text_has_that_size_with_its_number(texts):
    assert abs(count_words(texts.fresh(Random(2), 200)) - 200) <= 2


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_same_seed_gives_the_same_plan_and_another_round_shares_no_beginning(texts, name):
    scenario = SCENARIOS[name]
    plans = [scenario.clients(texts, seed, quick=False) for seed in ("a/0", "a/0", "a/1")]
    assert plans[0] == plans[1]
    assert not first_words(plans[0]) & first_words(plans[2])


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("quick", [False, True])
def test_every_request_fits_the_context_that_the_scenario_asks_for(texts, name, quick):
    scenario = SCENARIOS[name]
    for client in scenario.clients(texts, "fit", quick=quick):
        needed = 0
        for turn in client.turns:
            sizes = [count_words(message["content"]) + 8 for message in turn.messages]
            needed = sum(sizes) + turn.max_tokens + (needed if client.history else 0)
            assert needed + 40 <= scenario.shape.n_ctx


@pytest.mark.parametrize("name", SCENARIOS)
def test_clients_wait_only_for_groups_that_there_are(texts, name):
    clients = SCENARIOS[name].clients(texts, "groups", quick=False)
    groups = {client.group for client in clients}
    named = {client.after for client in clients} | {client.until for client in clients}
    assert (named | {SCENARIOS[name].leavers}) - {None} <= groups


@pytest.mark.parametrize("name", SCENARIOS)
def test_goals_are_of_figures_that_are_shown(name):
    scenario = SCENARIOS[name]
    assert {goal.figure for goal in scenario.goals} <= set(scenario.shows) <= set(FIGURES)


def test_arrivals_are_in_order_and_within_their_time():
    moments = arrivals(Random(3), 50, 2.0)
    assert moments == sorted(moments)
    assert 0 <= moments[0] < 0.04
    assert 1.96 <= moments[-1] < 2.0


def test_shared_prefix_shares_one_text_and_its_questions_differ(texts):
    turns = [turn for client in SCENARIOS["shared-prefix"].build(texts, Random(4)) for turn in client.turns]
    assert len(turns) == 32
    assert len({turn.messages[0]["content"] for turn in turns}) == 1
    assert len({turn.messages[1]["content"] for turn in turns}) == 32


def test_each_context_of_rag_is_asked_about_by_four_clients(texts):
    clients = SCENARIOS["rag"].build(texts, Random(5))
    contexts = [client.turns[0].messages[0]["content"] for client in clients]
    assert len(contexts) == 40
    assert {contexts.count(each) for each in contexts} == {4}
    assert len(set(contexts[:10])) > 3  # in mixed order


def test_oversubscription_needs_three_times_the_cells(texts):
    needed = 0
    for client in oversubscribed(texts, Random(6)):
        (turn,) = client.turns
        needed += count_words(turn.messages[0]["content"]) + 30 + turn.max_tokens
    assert 2.9 <= needed / 8192 <= 3.05


@pytest.mark.parametrize(
    "words",
    [
        ["--scenarios", "nothing"],
        ["--scenarios", ""],
        ["--rounds", "0"],
        ["--slots", "-1"],
        ["--threads", "two"],
        ["--scenarios", "long-6000", "--n-ctx", "4096"],
    ],
)
def test_what_cannot_be_carried_out_is_refused_before_anything_starts(words, capsys):
    with pytest.raises(SystemExit) as refused:
        parsed(words)
    assert refused.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_scenarios_are_named_by_commas():
    assert scenario_names("rag, clients-8") == ["rag", "clients-8"]
