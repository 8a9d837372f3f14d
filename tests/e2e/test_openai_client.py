"""openai-python against the live server, as its users call it."""

import asyncio
import json
import math

import openai
import pytest

#: Its answer's tokens lead by far, so that rounding in another batch changes none.
ASK = [{"role": "user", "content": "What is 2+2?"}]
CAPITALS = "The capital of France is Paris. The capital of Germany is Berlin. The capital of Italy is"


def test_models_are_listed_with_their_context(client):
    listed = {model.id: model for model in client.models.list()}
    assert set(listed) == {"smol", "terse", "porter", "all-minilm-l6-v2"}
    assert listed["smol"].n_ctx == 2048
    assert client.models.retrieve("porter").collection == "house"


def test_a_chat_is_answered_and_counted(client):
    answer = client.chat.completions.create(model="smol", messages=ASK, max_tokens=16, temperature=0)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens <= 16
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer._request_id.startswith("req_")


def test_a_stream_says_what_the_whole_answer_says(client):
    fields = {"model": "smol", "messages": ASK, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == (
        whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_the_async_client_gets_the_same_from_several_requests_at_once(served):
    async def ask(client, stream):
        fields = {"model": "smol", "messages": ASK, "max_tokens": 12, "temperature": 0}
        if not stream:
            return (await client.chat.completions.create(**fields)).choices[0].message.content
        text = ""
        async for chunk in await client.chat.completions.create(**fields, stream=True):
            text += chunk.choices[0].delta.content or ""
        return text

    async def crowd():
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=served.key, timeout=60) as client:
            return await asyncio.gather(*(ask(client, number % 2 == 0) for number in range(6)))

    texts = asyncio.run(crowd())
    assert all(texts)
    assert len(set(texts)) == 1


def test_choices_seeds_logprobs_and_stops(client):
    invent = [{"role": "user", "content": "Invent a name for a boat."}]
    fields = {"model": "smol", "messages": invent, "max_tokens": 8, "temperature": 1.5}
    two = client.chat.completions.create(**fields, n=2, seed=5, logprobs=True, top_logprobs=3)
    texts = [choice.message.content for choice in two.choices]
    assert len(set(texts)) == 2
    one, again = (
        client.chat.completions.create(**fields, seed=6).choices[0].message.content for _ in range(2)
    )
    assert one == again
    first = two.choices[0].logprobs.content[0]
    assert len(first.top_logprobs) == 3
    assert first.logprob <= 0
    assert bytes(first.bytes).decode() == first.token
    greedy = client.chat.completions.create(model="smol", messages=ASK, max_tokens=20, temperature=0)
    word = greedy.choices[0].message.content.split()[2]
    cut = client.chat.completions.create(model="smol", messages=ASK, max_tokens=20, temperature=0, stop=word)
    assert word not in cut.choices[0].message.content
    assert cut.choices[0].finish_reason == "stop"


def test_logit_bias_decides_a_token(client):
    fields = {"model": "smol", "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}
    forced = client.completions.create(**fields, logit_bias={"100": 100})
    other = client.completions.create(**fields, logit_bias={"100": 100, "200": 100, "300": -100})
    assert forced.choices[0].text != client.completions.create(**fields).choices[0].text
    assert other.choices[0].text
    with pytest.raises(openai.BadRequestError, match="logit_bias"):
        client.completions.create(**fields, logit_bias={"999999": -100})


def test_completions_continue_and_stream(client):
    fields = {"model": "smol", "prompt": CAPITALS, "max_tokens": 1, "temperature": 0}
    whole = client.completions.create(**fields, echo=True)
    assert whole.choices[0].text.startswith(f"{CAPITALS} Rome")
    streamed = [
        chunk.choices[0].text for chunk in client.completions.create(**fields, echo=True, stream=True)
    ]
    assert "".join(streamed) == whole.choices[0].text


def test_json_formats_are_kept(client):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Describe Ann, who is 30, as JSON."}],
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        max_tokens=120,
        temperature=0,
    )
    found = json.loads(answer.choices[0].message.content)
    assert set(found) == {"name", "age"}


def test_embeddings_are_near_for_near_texts(client):
    texts = ["A cat sleeps on the sofa.", "A kitten naps on the couch.", "Interest rates rose."]
    response = client.embeddings.create(model="all-minilm-l6-v2", input=texts)  # base64 on the wire
    plain = client.embeddings.create(model="all-minilm-l6-v2", input=texts, encoding_format="float")
    vectors = [item.embedding for item in response.data]
    assert all(len(vector) == 384 for vector in vectors)
    assert math.isclose(sum(value * value for value in vectors[0]), 1, rel_tol=1e-3)
    near, far = (sum(a * b for a, b in zip(vectors[0], other, strict=True)) for other in vectors[1:])
    assert near > far + 0.3
    assert vectors[0] == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert response.usage.prompt_tokens > 10


def test_an_assistant_is_a_model_with_defaults(client):
    answers = {
        client.chat.completions.create(model="terse", messages=ASK).choices[0].message.content
        for _ in range(2)
    }
    assert len(answers) == 1


def test_grounded_answers_carry_their_sources(client):
    question = [{"role": "user", "content": "What is the red boat called?"}]
    answer = client.chat.completions.create(model="porter", messages=question)
    message = answer.choices[0].message
    assert "Heron" in message.content
    best = message.sources[0]
    assert best["file"].endswith("boats.md")
    assert "Heron" in best["quote"]
    assert best["end"] - best["start"] == len(best["quote"])
    chunks = list(client.chat.completions.create(model="porter", messages=question, stream=True))
    streamed = chunks[-1].choices[0].delta.sources
    assert [source["quote"] for source in streamed] == [source["quote"] for source in message.sources]
    again = [*question, message, {"role": "user", "content": "How many people does it carry?"}]
    assert client.chat.completions.create(model="porter", messages=again).choices[0].message.content
    by_request = client.chat.completions.create(
        model="smol", messages=question, max_tokens=20, temperature=0, extra_body={"collection": "house"}
    )
    assert by_request.choices[0].message.sources


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "nope"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": "hot"}, openai.BadRequestError, "invalid_type_or_value"),
        ({"extra_body": {"foo": 1}}, openai.BadRequestError, "unknown_parameter"),
        ({"tools": [{"type": "function"}]}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"collection": "nope"}}, openai.NotFoundError, "collection_not_found"),
    ],
)
def test_bad_requests_raise_openais_own_errors(client, fields, error, code):
    with pytest.raises(error) as raised:
        client.chat.completions.create(**({"model": "smol", "messages": ASK} | fields))
    assert raised.value.code == code


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="smol", messages=[{"role": "user", "content": "word " * 5000}])
    assert raised.value.code == "context_length_exceeded"
    assert raised.value.body["n_ctx"] == 2048
    assert raised.value.body["n_prompt_tokens"] > 5000


def test_a_wrong_key_is_refused(served):
    stranger = openai.OpenAI(base_url=f"{served.url}/v1", api_key="wrong")
    with stranger, pytest.raises(openai.AuthenticationError, match="wrong"):
        stranger.models.list()
