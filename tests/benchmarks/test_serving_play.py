"""A round and what is played beside it, with a load that only notes who was asked."""

import asyncio

import pytest

from benchmarks.serving import play as play_module
from benchmarks.serving.alone import Solo
from benchmarks.serving.catalogue import SCENARIOS
from benchmarks.serving.client import Outcome
from benchmarks.serving.keys import secret, settings
from benchmarks.serving.load import Round, Target
from benchmarks.serving.play import one_by_one, play, staying
from benchmarks.serving.texts import Texts
from server.auth import read_keys
from server.key_settings import policy
from server.settings import load

TARGET = Target(port=1, model="m", running_metric="running", timeout_s=1)


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts.sized(lambda text: len(text.split()))


@pytest.fixture
def rounds(monkeypatch) -> list[list]:
    """The plans that were played, in order."""
    played = []

    async def run_round(_target, clients, *, leavers=None, watch_memory=False):
        played.append([leavers, watch_memory, clients])
        return Round([Outcome(client.group, number, 0) for number, client in enumerate(clients)])

    monkeypatch.setattr(play_module, "SETTLE_S", 0.0)
    monkeypatch.setattr(play_module, "run_round", run_round)
    return played


@pytest.mark.parametrize("name", ["abandoned", "flood"])
def test_a_round_without_a_group_follows(texts, rounds, name):
    scenario = SCENARIOS[name]
    result = play(TARGET, scenario, texts, "a/0", quick=True, asks_alone=False)
    (leavers, _, full), (_, _, without) = rounds
    assert leavers == scenario.leavers
    assert {client.group for client in full} - {client.group for client in without} == {scenario.without}
    assert result.without is not None
    assert {each.group for each in result.outcomes} > {each.group for each in result.without.outcomes}


@pytest.mark.parametrize(("name", "is_same"), [("abandoned", True), ("flood", False)])
def test_waits_are_compared_with_texts_that_are_not_cached_and_rates_with_the_same(
    texts, rounds, name, is_same
):
    play(TARGET, SCENARIOS[name], texts, "a/0", quick=True, asks_alone=False)
    (_, _, full), (_, _, without) = rounds
    asked = [
        {turn.messages[0]["content"] for client in plan for turn in client.turns} for plan in (full, without)
    ]
    assert (asked[0] >= asked[1]) == is_same
    assert bool(asked[0] & asked[1]) == is_same


@pytest.mark.parametrize("name", [name for name, each in SCENARIOS.items() if each.without])
def test_who_stays_waits_for_nobody_of_the_group_that_is_left_out(texts, name):
    scenario = SCENARIOS[name]
    clients = staying(scenario.clients(texts, "s", quick=False), str(scenario.without))
    assert clients
    assert scenario.without not in {client.after for client in clients} | {client.until for client in clients}


def test_memory_is_watched_where_the_scenario_says_so(texts, rounds):
    play(TARGET, SCENARIOS["memory"], texts, "a/0", quick=True, asks_alone=False)
    assert [watched for _, watched, _ in rounds] == [True]


def test_every_request_is_asked_alone_one_after_the_other(texts, rounds, monkeypatch):
    busy, asked = [], []

    async def ask_alone(_port, body, *, client, turn, **_):
        assert not busy
        busy.append(client)
        await asyncio.sleep(0)
        busy.pop()
        asked.append((client, turn, body["messages"][0]["content"]))
        return Solo(client, turn)

    monkeypatch.setattr(play_module, "ask_alone", ask_alone)
    result = play(TARGET, SCENARIOS["oversubscribed"], texts, "a/0", quick=True, asks_alone=True)
    (_, _, clients), *_ = rounds
    expected = [(n, 0, each.turns[0].messages[0]["content"]) for n, each in enumerate(clients)]
    assert asked == expected + expected[:8]  # some twice: what differs there is not the load's doing
    assert (len(result.alone), len(result.again)) == (32, 8)


def test_nothing_is_asked_alone_of_an_empty_plan():
    assert asyncio.run(one_by_one(TARGET, [])) == ()


@pytest.mark.parametrize("name", [name for name, each in SCENARIOS.items() if each.keys])
def test_the_server_knows_the_keys_that_the_clients_send(texts, tmp_path, monkeypatch, name):
    monkeypatch.delenv("LQ_API_KEY", raising=False)
    scenario = SCENARIOS[name]
    file = tmp_path / "lq.toml"
    file.write_text(settings(scenario.keys), "utf-8")
    given = load(file)
    keys = read_keys(given)
    groups = {client.group for client in scenario.clients(texts, "k", quick=False)}
    assert groups == set(scenario.keys)
    for group, weight in scenario.keys.items():
        assert keys.check(f"Bearer {secret(group)}") == group
        assert policy(group, given.keys[group], given.limits).weight == weight
