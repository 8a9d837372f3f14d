"""An engine that dies: an answer that is sent whole begins anew, a stream that has begun fails."""

import json

import pytest

PLAIN = {"model": "fake", "prompt": "Hi"}


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_whole_answer_holds_nothing_of_the_attempt_that_died(house, route):
    chat = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
    body = chat if route.startswith("chat") else PLAIN | {"logprobs": 0}
    expected = house.call("POST", f"/v1/{route}", json=body).json()
    house.engine.dies = True
    answer = house.call("POST", f"/v1/{route}", json=body)
    assert answer.status_code == 200
    assert answer.json()["choices"] == expected["choices"]
    assert answer.json()["usage"] == expected["usage"]
    assert not house.engine.dies


def test_a_stream_that_has_begun_is_told(house):
    house.engine.dies = True
    frames = house.call("POST", "/v1/completions", json=PLAIN | {"stream": True}).text
    last = json.loads(frames.strip().splitlines()[-1].removeprefix("data: "))
    assert last["error"]["code"] == "engine_restarted"


def test_tokens_of_the_attempt_that_died_are_not_charged(build):
    limits = {"alice": {"tokens_per_minute": 1000}}
    house = build(keys=[("alice", "key-of-alice")], key_limits=limits, clock=lambda: 0.0)
    for dies in (False, True):
        house.engine.dies = dies
        headers = {"authorization": "Bearer key-of-alice"}
        got = house.call("POST", "/v1/completions", json=PLAIN | {"max_tokens": 3}, headers=headers)
        assert got.status_code == 200
    asked = len("Hi") + len(house.engine.says)
    level = house.service.accounts._accounts["alice"].bucket.level(0.0)
    assert level == 1000 - 2 * asked
