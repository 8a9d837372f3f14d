"""/v1/completions, /v1/embeddings, /v1/models, /metrics and /docs over a fake engine and embedder."""

import asyncio
import base64
import json
import re

import numpy as np
import pytest

from server.embedding import EmbedderThread
from server.errors import EmbedderBusy


def complete(house, **fields):
    return house.call("POST", "/v1/completions", json={"model": "fake", "prompt": "Once"} | fields)


def embed(house, text, **fields):
    return house.call("POST", "/v1/embeddings", json={"model": "all-minilm-l6-v2", "input": text} | fields)


def test_a_completion_continues_the_text_as_it_is(house):
    answer = complete(house).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"] == [{"index": 0, "text": "Hello!", "logprobs": None, "finish_reason": "stop"}]
    request = house.engine.requests[-1]
    assert (request.prompt, request.max_tokens, request.parse_special) == ("Once", 16, True)


def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(house):
    answer = complete(house, prompt=["a", "bb"], n=2, echo=True).json()
    assert [choice["text"] for choice in answer["choices"]] == ["aHello!", "aHello!", "bbHello!", "bbHello!"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 12


def test_token_ids_are_taken_and_checked(house):
    assert complete(house, prompt=[72, 105], echo=True).json()["choices"][0]["text"] == "HiHello!"
    assert house.engine.requests[-1].prompt == (72, 105)
    assert "258" in complete(house, prompt=[1000]).json()["error"]["message"]


def test_logprobs_have_the_older_shape(house):
    logprobs = complete(house, logprobs=1).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hel", "lo", "!"]
    assert logprobs["text_offset"] == [0, 3, 5]
    assert logprobs["top_logprobs"][0] == {"x": -2.0}


def test_a_stream_of_text_ends_with_reason_usage_done(house):
    response = complete(house, stream=True, echo=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    *chunks, usage = map(json.loads, lines[:-1])
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "OnceHello!"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 2}, "best_of"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "echo": True, "logprobs": 1}, "echo"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"messages": []}, "messages"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "x" * 4000}, "prompt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_what_cannot_be_completed_is_refused_by_name(house, fields, param):
    response = complete(house, **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_embeddings_are_the_same_as_floats_and_base64(house):
    floats = embed(house, ["banana", "tree"]).json()
    packed = embed(house, ["banana", "tree"], encoding_format="base64").json()
    assert [item["index"] for item in floats["data"]] == [0, 1]
    for one, other in zip(floats["data"], packed["data"], strict=True):
        decoded = np.frombuffer(base64.b64decode(other["embedding"]), "<f4")
        np.testing.assert_array_equal(np.array(one["embedding"], np.float32), decoded)
    assert floats["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    assert embed(house, "banana").json()["data"][0]["embedding"] == floats["data"][0]["embedding"]


def test_queries_may_be_embedded_apart_from_documents(house):
    document = embed(house, "banana").json()["data"][0]["embedding"]
    query = embed(house, "banana", input_type="query").json()["data"][0]["embedding"]
    assert query == [-value for value in document]


@pytest.mark.parametrize(
    ("text", "fields", "param", "words"),
    [
        ([1, 2], {}, "input", "check_embedding_ctx_length=False"),
        ([[1, 2]], {}, "input", "check_embedding_ctx_length=False"),
        ("", {}, "input", "length"),
        ([], {}, "input", "length"),
        (["ok", "w " * 21], {}, "input[1]", "21 tokens and the embedder reads 20"),
        ("w" * 1281, {}, "input", "1281 characters"),
        (["ok"] * 40 + ["w" * 1281], {}, "input[40]", "20 tokens, never more than 1280 characters"),
        ("x", {"dimensions": 2}, "dimensions", "one width"),
        ("x", {"encoding_format": "hex"}, "encoding_format", "'hex'"),
        ("x", {"model": "fake"}, "model", "all-minilm-l6-v2"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(house, text, fields, param, words):
    error = embed(house, text, **fields).json()["error"]
    assert error["param"] == param
    assert words in error["message"]


def test_a_text_far_too_long_is_refused_before_its_tokens_are_counted(house):
    assert embed(house, "x" * 1280).status_code == 200
    assert embed(house, "x" * 5_000_000).json()["error"]["code"] == "context_length_exceeded"
    assert house.embedder.counted == [1280]


def test_the_embedding_queue_is_bounded():
    async def crowd():
        thread = EmbedderThread(lambda _: None, max_queue=2)  # type: ignore[arg-type, return-value]
        jobs = [thread.use("x", lambda _: 1) for _ in range(4)]  # one runs, two wait
        found = await asyncio.gather(*jobs, return_exceptions=True)
        await thread.close()
        return found

    found = asyncio.run(crowd())
    assert found[:3] == [1, 1, 1]
    assert isinstance(found[3], EmbedderBusy)


def test_metrics_count_requests_and_tokens_by_name(house):
    house.chat()
    house.chat(foo=1)
    text = house.call("GET", "/metrics").text
    for line in (
        'lq_http_requests_total{method="POST",route="/v1/chat/completions",status="200"} 1.0',
        'lq_http_requests_total{method="POST",route="/v1/chat/completions",status="400"} 1.0',
        'lq_tokens_total{kind="prompt",model="fake"} 21.0',
        'lq_tokens_total{kind="cached",model="fake"} 3.0',
        'lq_tokens_total{kind="completion",model="fake"} 3.0',
        'lq_time_to_first_token_seconds_count{model="fake"} 1.0',
        'lq_engine_waiting{model="fake"} 2.0',
    ):
        assert line in text


def test_health_tells_when_an_engine_is_down(house):
    assert house.call("GET", "/health").json() == {"status": "ok"}
    house.engine.alive = False
    response = house.call("GET", "/health")
    assert (response.status_code, response.json()["engines_down"]) == (503, ["fake"])


def test_the_page_documents_every_field_and_needs_no_network(house):
    page = house.call("GET", "/docs").text
    assert "POST /v1/chat/completions" in page
    for field in ("messages", "collection", "min_p", "response_format", "adapters", "hit_rates"):
        assert f"<code>{field}</code>" in page
    assert page.index("<code>messages</code> *") < page.index("<code>temperature</code>")
    linked = set(re.findall('href="#(.*?)"', page))
    assert linked >= {"UserMessage", "TextPart", "JSONSchemaFormat", "Adapter", "EngineState", "Slot"}
    assert linked <= set(re.findall("<h3 id=(.*?)>", page))
    assert not re.search(r"None|`", page)
    assert "http" not in page
    document = house.call("GET", "/docs/openapi.json").json()
    assert "ChatRequest" in document["components"]["schemas"]
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    assert body["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatRequest"}
