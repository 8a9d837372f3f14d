"""What `lq ask` sends: which model, and how long its answer may be."""

import asyncio

import httpx
import pytest

from lq.commands.ask import ANSWER_TOKENS, AskError, _completed, _is_loopback

MODELS = {"data": [{"id": "smol", "kind": "chat"}, {"id": "terse", "kind": "assistant"}, {"id": "other"}]}


def completed(body, listed=MODELS):
    async def run():
        reply = httpx.MockTransport(lambda _: httpx.Response(200, json=listed))
        async with httpx.AsyncClient(transport=reply, base_url="http://x") as client:
            return await _completed(client, body)

    return asyncio.run(run())


def test_a_model_gets_a_limit_an_assistant_keeps_its_own_and_a_given_one_holds():
    assert completed({"model": "smol"}) == {"model": "smol", "max_tokens": ANSWER_TOKENS}
    assert completed({"model": "other"})["max_tokens"] == ANSWER_TOKENS
    assert completed({"model": "terse"}) == {"model": "terse"}
    for name in ("smol", "terse"):
        assert completed({"model": name, "max_tokens": 3})["max_tokens"] == 3
    assert completed({"model": "nope"})["model"] == "nope"  # the server says what is near


def test_without_a_name_the_first_model_is_asked():
    assert completed({})["model"] == "smol"


@pytest.mark.parametrize("listed", [[], {}, {"data": []}, {"data": [{}]}, {"data": [3]}, "x"])
def test_a_list_of_another_shape_is_an_error_of_one_line(listed):
    with pytest.raises(AskError, match="lists no models"):
        completed({}, listed)


def test_loopback_is_known_by_name_and_number():
    assert all(map(_is_loopback, ["localhost", "127.0.0.1", "127.1.2.3", "::1"]))
    assert not any(map(_is_loopback, ["", "example.org", "10.0.0.1", "localhost.example.org"]))
