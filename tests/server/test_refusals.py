"""Bad requests: each is one clear error in OpenAI's shape that names the field."""

import asyncio
import difflib

import pytest

from server.settings import HTTP

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"foo": 1}, "foo", ["unknown field"]),
        ({"temprature": 1}, "temprature", ["`temperature`"]),
        ({"temperature": "1"}, "temperature", ["float", "str"]),
        ({"temperature": True}, "temperature", ["float", "bool"]),
        ({"temperature": 2.5}, "temperature", ["2.0", "2.5"]),
        ({"n": 9}, "n", ["8", "9"]),
        ({"max_tokens": 0}, "max_tokens", ["1", "0"]),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", ["differ"]),
        ({"stop": ["a"] * 17}, "stop", ["16", "17"]),
        ({"stop": [""]}, "stop[0]", ["1"]),
        ({"top_logprobs": 2}, "top_logprobs", ["logprobs"]),
        ({"logit_bias": {"a": 1}}, "logit_bias", ["int"]),
        ({"logit_bias": {"99999": 1}}, "logit_bias", ["99999", "258"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", ["unknown field"]),
        ({"tools": [{}]}, "tools", ["not supported"]),
        ({"tool_choice": "auto"}, "tool_choice", ["not supported"]),
        ({"reasoning_effort": "high"}, "reasoning_effort", ["reasoning"]),
        ({"store": True}, "store", ["stored"]),
        ({"service_tier": "flex"}, "service_tier", ["auto"]),
        ({"modalities": ["audio"]}, "modalities[0]", ["text"]),
        ({"messages": []}, "messages", ["length"]),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", ["'tool'", "user"]),
        ({"messages": [{"role": "user", "content": "x", "name": "n"}]}, "messages[0].name", ["content"]),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            ["text parts"],
        ),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["required"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["'xml'"]),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": {"not": {}}}}},
            "response_format.json_schema.schema.not",
            ["cannot be kept"],
        ),
        ({"prompt": "gronded"}, "prompt", ["did you mean 'grounded'"]),
        ({"prompt": "../../etc/passwd"}, "prompt", ["no name"]),
        ({"prompt": "grounded"}, "collection", ["sources"]),
        ({"collection": "nope"}, "collection", ["no collection 'nope'", "lq index"]),
        ({"collection": "../x"}, "collection", ["no name"]),
        ({"collection": "a:b"}, "collection", ["no name", "64"]),
        ({"collection": "x" * 65}, "collection", ["no name"]),
        ({"collection": "nope\n"}, "collection", ["no name"]),
        ({"prompt": "grounded\n"}, "prompt", ["no name"]),
        ({"passages": 3}, "passages", ["collection"]),
        ({"prompt_variables": {"a": "b"}}, "prompt_variables", ["prompt"]),
        ({"prompt": "plain", "prompt_variables": {"a": "b"}}, "prompt", ["no variable `a`"]),
        ({"model": "nope"}, "model", ["nope", "fake"]),
        ({"model": "all-minilm-l6-v2"}, "model", ["/v1/embeddings"]),
        ({"model": ""}, "model", ["1"]),
    ],
)
def test_a_bad_field_is_named(house, fields, param, words):
    response = house.call("POST", "/v1/chat/completions", json=CHAT | fields)
    error = response.json()["error"]
    assert response.status_code == (404 if error["code"].endswith("not_found") else 400)
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert error["param"] == param
    for word in words:
        assert word in error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert house.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"x" * 9_000_000: 1}, None),
        ({"prompt": "plain", "prompt_variables": {"x" * 9_000_000: "b"}}, "prompt"),
        ({"messages": [{"role": "x" * 9_000_000, "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "n" * 9_000_000: 1}]}, None),
    ],
)
def test_a_name_of_megabytes_is_refused_in_a_few_words(house, fields, param):
    response = house.call("POST", "/v1/chat/completions", json=CHAT | fields)
    error = response.json()["error"]
    assert response.status_code == 400
    assert len(error["message"]) < 1500
    assert len(error["param"]) < 1500
    assert param is None or error["param"] == param


def test_names_are_compared_by_their_first_characters_alone(house, monkeypatch):
    compared = []
    real = difflib.get_close_matches
    monkeypatch.setattr(
        "difflib.get_close_matches",
        lambda name, *others, **options: compared.append(len(name)) or real(name, *others, **options),
    )
    house.chat(**{"x" * 90_000: 1})
    house.chat(prompt="plain", prompt_variables={"x" * 90_000: "b"})
    assert compared == [100, 100]


def test_errors_of_a_prompt_name_it_and_no_path_of_the_server(build, tmp_path):
    (tmp_path / "mine.prompt").write_text("user:\n{{ question }}\n{{ question.nothing }}")
    (tmp_path / "few.prompt").write_text(
        "---\nmetadata: {lq: {demos: {file: none.yaml}}}\n---\nuser:\n{{ question }}"
    )
    house = build(server=HTTP(prompts=str(tmp_path)))
    for name, words in [
        ("mine", "the prompt 'mine', line 3"),
        ("few", "the prompt 'few': the demo file none.yaml"),
    ]:
        error = house.chat(prompt=name).json()["error"]
        assert (error["code"], error["param"]) == ("invalid_prompt", "prompt")
        assert error["message"].startswith(words)
        assert str(tmp_path) not in error["message"]


def test_more_sequences_than_ever_fit_are_refused_with_both_numbers(build):
    house = build()
    body = {"model": "fake", "prompt": ["x"] * 64, "n": 8}
    response = house.call("POST", "/v1/completions", json=body)
    assert response.status_code == 400
    for word in ("512 sequences", "takes 260"):
        assert word in response.json()["error"]["message"]
    assert house.engine.requests == []
    assert house.call("POST", "/v1/completions", json=body | {"n": 4}).status_code == 200
    assert len(house.engine.requests) == 256


@pytest.mark.parametrize("missing", ["model", "messages"])
def test_a_missing_field_is_named(house, missing):
    body = {name: value for name, value in CHAT.items() if name != missing}
    error = house.call("POST", "/v1/chat/completions", json=body).json()["error"]
    assert (error["param"], error["code"]) == (missing, "missing_required_parameter")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": NaN}',
        b'{"model":"\xff"}',
        b'{"a":' + b"[" * 100_000,
        b'{"model":"\\ud800"}',
    ],
)
def test_what_is_not_json_is_said_to_be_so(house, body):
    headers = {"content-type": "application/json"}
    response = house.call("POST", "/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["code"] in {"invalid_json", "unknown_parameter"}


def test_json_that_is_no_object_is_refused(house):
    error = house.call("POST", "/v1/chat/completions", json=[1]).json()["error"]
    assert error["message"] == "body: expected `object`, got `array`"


def test_a_body_that_is_not_declared_as_json_is_refused(house):
    response = house.call(
        "POST", "/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}
    )
    assert response.status_code == 415
    assert "application/json" in response.json()["error"]["message"]


def test_a_body_over_the_limit_is_refused_whether_declared_or_not(house):
    big = b"x" * (10 * 2**20 + 1)
    for headers in ({}, {"content-length": "5"}):  # the second lies
        response = house.call(
            "POST",
            "/v1/chat/completions",
            content=big,
            headers={"content-type": "application/json"} | headers,
        )
        assert response.status_code == 413
        assert "10 MiB" in response.json()["error"]["message"]


def test_without_or_with_a_wrong_key_nothing_is_served_but_health(build):
    house = build(keys=[("alice", "correct-key")])
    for headers, word in [
        ({}, "no API key"),
        ({"authorization": "Bearer wrong"}, "wrong"),
        ({"authorization": "Basic correct-key"}, "wrong"),
        ({"authorization": "Bearer"}, "no API key"),
    ]:
        for method, path in [("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("GET", "/metrics")]:
            response = house.call(method, path, headers=headers)
            assert response.status_code == 401
            assert word in response.json()["error"]["message"]
            assert response.json()["error"]["code"] == "invalid_api_key"
    assert house.call("GET", "/health").status_code == 200
    assert house.call("GET", "/v1/models", headers={"authorization": "Bearer correct-key"}).status_code == 200


def test_a_foreign_host_header_is_refused(house):
    response = house.call("GET", "/v1/models", headers={"host": "evil.example"})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "host_not_allowed")
    for host in ("127.0.0.1:8000", "localhost", "[::1]:8000"):
        assert house.call("GET", "/v1/models", headers={"host": host}).status_code == 200


def test_no_origin_is_allowed_by_default(house):
    response = house.call("GET", "/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_unknown_routes_and_methods_have_openais_shape(house):
    assert house.call("GET", "/v1/nope").json()["error"]["code"] == "route_not_found"
    response = house.call("GET", "/v1/chat/completions")
    assert (response.status_code, response.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_request_id_is_on_every_answer_and_a_sane_one_comes_back(house):
    for path in ("/health", "/nope", "/v1/models"):
        assert house.call("GET", path).headers["x-request-id"].startswith("req_")
    given = house.call("GET", "/health", headers={"x-request-id": "my-id.1"})
    assert given.headers["x-request-id"] == "my-id.1"
    given = house.call("GET", "/health", headers={"x-request-id": "x" * 500})
    assert given.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_cancels_its_sequences(house, stream, n):
    async def leave() -> None:
        house.engine.pause = asyncio.Event()
        async with house.client() as client:
            if stream:
                async with client.stream(
                    "POST", "/v1/chat/completions", json=CHAT | {"stream": True, "n": n}
                ) as got:
                    async for line in got.aiter_lines():
                        if '"content":"Hel"' in line:
                            break
            else:
                asking = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT | {"n": n}))
                while len(house.engine.requests) < n:
                    await asyncio.sleep(0)
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        # Here, not after the loop: its end would close whatever was left open.
        assert house.engine.cancelled == n

    asyncio.run(leave())
    assert len(house.engine.requests) == n
