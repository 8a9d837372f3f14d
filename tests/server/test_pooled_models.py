"""Embedding and reranking models behind the API: /v1/embeddings, /v1/rerank, what is refused and how."""

import asyncio
import base64
from typing import Any

import httpx
import numpy as np
import pytest

from engine.request import EngineRestarted, ModelLoadFailed, QueueFull
from models import placement
from models.gguf import InvalidGGUF, read_header
from models.placement import Bytes
from models.store import Store
from server import pooled
from server.app import create_app
from server.auth import Keys, accept
from server.in_process import BASE_URL, InProcess
from server.key_settings import Limits
from server.machine import Machine
from server.service import opened
from server.settings import Adapter, Assistant, Model, Settings, SettingsError, complete
from tests import tiny_models as tiny

SMOL = "smollm2-135m-instruct"
TEXTS = ["the cat sleeps", "a dog", "where is the red house?"]
GB = 10**9


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.bert(folder / "embed.gguf")
    tiny.bert(folder / "mute.gguf", pooling=None)
    tiny.bert(folder / "rank.gguf", pooling="rank", head=True)
    tiny.bert(folder / "headless.gguf", pooling="rank")
    tiny.qwen3(folder / "last.gguf")
    return folder


@pytest.fixture
def served(files, asset_home, make_engine):
    """A function: runs `scenario(post, service, engines)` over an embedding, a ranking and a chat model.

    `real`: with engines of their own, else with fakes, which `engines` holds by kind; `fails`: none starts.
    """

    def run(scenario, *, real=False, keys=(), fails=None, **fields):
        models: Any = {
            "embed": Model(model=str(files / "embed.gguf"), threads=1),
            "rank": Model(model=str(files / "rank.gguf"), threads=1),
            "smol": Model(model=SMOL, n_ctx=256),
        }
        settings = complete(Settings(**({"models": models} | fields)), "test")
        engines = {}

        async def start(config):
            if fails:
                raise fails
            engines[config.kind] = make_engine()
            return engines[config.kind]

        async def main():
            async with opened(
                settings,
                keys=Keys([accept(name, key) for name, key in keys]),
                store=Store(asset_home),
                start=None if real else start,
                machine=Machine(20 * GB, 2),
            ) as service:
                transport = InProcess(create_app(service))
                async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=60) as client:

                    async def post(path, **body):
                        return await client.post(path, json=body)

                    return await scenario(post, service, engines)

        return asyncio.run(asyncio.wait_for(main(), 120))

    return run


def test_an_embedding_model_answers_as_openai_does(served, files):
    async def scenario(post, service, _):
        floats = (await post("/v1/embeddings", model="embed", input=TEXTS)).json()
        packed = (await post("/v1/embeddings", model="embed", input=TEXTS, encoding_format="base64")).json()
        short = (await post("/v1/embeddings", model="embed", input=TEXTS[0], dimensions=8)).json()
        wide = await post("/v1/embeddings", model="embed", input="a", dimensions=33)
        metrics = (await service.exposition()).decode()
        return floats, packed, short, wide.json()["error"], metrics

    floats, packed, short, wide, metrics = served(scenario, real=True)
    rows = np.array([item["embedding"] for item in floats["data"]], np.float32)
    assert [item["index"] for item in floats["data"]] == [0, 1, 2]
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    decoded = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in packed["data"]]
    np.testing.assert_array_equal(np.stack(decoded), rows)
    tokens = [2, *tiny.tokenize(TEXTS[0], files), 3]
    expected = tiny.hidden("bert", tiny.bert_weights(head=False, seed=1), tokens).mean(axis=0)
    np.testing.assert_allclose(rows[0], expected / np.linalg.norm(expected), atol=1e-4)
    n_tokens = sum(len(tiny.tokenize(text, files)) + 2 for text in TEXTS)
    assert floats["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    cut = rows[0, :8] / np.linalg.norm(rows[0, :8])
    np.testing.assert_allclose(short["data"][0]["embedding"], cut, atol=1e-5)
    assert (wide["param"], "32 numbers, fewer than 33" in wide["message"]) == ("dimensions", True)
    assert f'lq_tokens_total{{kind="prompt",model="embed"}} {2 * n_tokens + len(tokens)}.0' in metrics


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank"])
def test_a_ranking_model_puts_the_best_first(served, path):
    async def scenario(post, _service, _):
        every = await post(path, model="rank", query="the cat", documents=TEXTS)
        objects = [{"text": text} for text in TEXTS]
        best = await post(
            path, model="rank", query="the cat", documents=objects, top_n=2, return_documents=True
        )
        return every.json(), best.json()

    every, best = served(scenario, real=True)
    scores = [result["relevance_score"] for result in every["results"]]
    assert scores == sorted(scores, reverse=True)
    assert sorted(result["index"] for result in every["results"]) == [0, 1, 2]
    assert "document" not in every["results"][0]
    assert [result["index"] for result in best["results"]] == [r["index"] for r in every["results"][:2]]
    for result in best["results"]:
        assert result["document"] == {"text": TEXTS[result["index"]]}
    assert every["usage"]["total_tokens"] == every["usage"]["prompt_tokens"] > 3 * 3
    assert (every["object"], every["model"]) == ("list", "rank")


MESSAGES = [{"role": "user", "content": "Hi"}]


CHAT = "/v1/chat/completions"


@pytest.mark.parametrize(("path", "body", "words"), [
    (CHAT, {"model": "embed", "messages": MESSAGES}, "embeds texts: use it with /v1/embeddings"),
    (CHAT, {"model": "rank", "messages": MESSAGES}, "ranks documents: use it with /v1/rerank"),
    (CHAT, {"model": "all-minilm-l6-v2", "messages": MESSAGES}, "embeds texts: use it with /v1/emb"),
    ("/v1/completions", {"model": "embed", "prompt": "Hi"}, "embeds texts"),
    ("/v1/embeddings", {"model": "smol", "input": "Hi"}, "writes text: use it with /v1/chat"),
    ("/v1/embeddings", {"model": "rank", "input": "Hi"}, "ranks documents"),
    ("/v1/rerank", {"model": "smol", "query": "Hi", "documents": ["a"]}, "writes text"),
    ("/v1/rerank", {"model": "embed", "query": "Hi", "documents": ["a"]}, "embeds texts"),
    ("/v1/rerank", {"model": "all-minilm-l6-v2", "query": "Hi", "documents": ["a"]}, "embeds texts"),
])  # fmt: skip
def test_a_model_of_another_kind_is_refused_and_not_even_loaded(served, path, body, words):
    async def scenario(post, _service, engines):
        return await post(path, **body), engines

    response, engines = served(scenario)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "wrong_model_kind", "model")
    assert words in error["message"]
    assert not engines


@pytest.mark.parametrize(("body", "param", "words"), [
    ({"documents": []}, "documents", "length"),
    ({"documents": ["a", ""]}, "documents[...]", "length"),
    ({"documents": ["a", 1]}, "documents[1]", "got `int`"),
    ({"documents": [{"title": "a"}]}, "documents[0].title", "title"),
    ({"documents": ["a", "w " * 21]}, "documents[1]", "22 tokens and the model reads 20"),
    ({"query": ""}, "query", "length"),
    ({"query": None}, "query", "null"),
    ({"top_n": 0}, "top_n", ">= 1"),
    ({"return_documents": "yes"}, "return_documents", "bool"),
    ({"max_chunks_per_doc": 2}, "max_chunks_per_doc", "max_chunks_per_doc"),
])  # fmt: skip
def test_what_cannot_be_ranked_is_refused_by_name(served, body, param, words):
    async def scenario(post, _service, _):
        return await post("/v1/rerank", **({"model": "rank", "query": "q x", "documents": ["a"]} | body))

    response = served(scenario)
    error = response.json()["error"]
    assert response.status_code == 400
    assert words in error["message"]
    assert error["param"].startswith(param.partition("[...")[0])


@pytest.mark.parametrize(("body", "param", "words"), [
    ({"input": ["a", "w " * 21]}, "input[1]", "21 tokens and the model reads 20"),
    ({"input": "w " * 21}, "input", "21 tokens and the model reads 20"),
    ({"input": [1, 2]}, "input", "check_embedding_ctx_length=False"),
    ({"input": [""]}, "input", "length"),
    ({"input": "a", "input_type": "query"}, "input_type", "prefix"),
    ({"input": "a", "dimensions": 0}, "dimensions", ""),
    ({"input": "a", "dimensions": 9}, "dimensions", "8 numbers, fewer than 9"),
])  # fmt: skip
def test_what_cannot_be_embedded_is_refused_by_name(served, body, param, words):
    async def scenario(post, _service, _):
        return await post("/v1/embeddings", **({"model": "embed"} | body))

    response = served(scenario)
    error = response.json()["error"]
    assert response.status_code == 400
    assert words in error["message"]
    assert error["param"].startswith(param)


def test_unknown_names_tell_what_there_is(served):
    async def scenario(post, _service, _):
        ranked = await post("/v1/rerank", model="ranks", query="q", documents=["a"])
        embedded = await post("/v1/embeddings", model="nope", input="a")
        chatted = await post("/v1/chat/completions", model="nope", messages=MESSAGES)
        return ranked, embedded, chatted

    ranked, embedded, chatted = served(scenario)
    assert [each.status_code for each in (ranked, embedded, chatted)] == [404] * 3
    assert "did you mean 'rank'?" in ranked.json()["error"]["message"]
    assert "embed" in embedded.json()["error"]["message"]
    assert chatted.json()["error"]["message"].endswith("there are: smol")


def test_failures_of_the_engine_have_their_own_status(served):
    async def scenario(post, _service, engines):
        await post("/v1/embeddings", model="embed", input="a")
        statuses = []
        for error in (QueueFull(3, 7.0), EngineRestarted("again")):
            engines["embedding"].fails = error
            response = await post("/v1/embeddings", model="embed", input="a")
            statuses.append((response.status_code, response.headers["retry-after"]))
        return statuses

    assert served(scenario) == [(429, "7"), (503, "2")]


def test_a_model_that_cannot_be_loaded_is_told_by_name(served):
    async def scenario(post, _service, _):
        return await post("/v1/rerank", model="rank", query="q", documents=["a"])

    response = served(scenario, fails=ModelLoadFailed("/secret/x.gguf: no"))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_loaded")


def test_limits_of_a_key_count_what_was_read(served):
    async def scenario(post, _service, _):
        first = await post("/v1/rerank", model="rank", query="q ", documents=["w " * 9] * 4)
        second = await post("/v1/rerank", model="rank", query="q ", documents=["w " * 9] * 4)
        return first, second

    first, second = served(scenario, limits=Limits(tokens_per_minute=40))
    assert first.json()["usage"]["total_tokens"] == 40
    assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")


def test_a_key_is_needed_where_keys_are(served):
    async def scenario(post, _service, _):
        return await post("/rerank", model="rank", query="q", documents=["a"])

    assert served(scenario, keys=[("a", "secret-key")]).status_code == 401


def test_models_and_engines_tell_their_kind(served):
    async def scenario(_post, service, _):
        return {model.id: (model.kind, model.n_ctx) for model in service.roster.models()}

    kinds = served(scenario)
    assert kinds["embed"] == ("embedding", tiny.CONTEXT)
    assert kinds["rank"] == ("rerank", tiny.CONTEXT)
    assert kinds["smol"] == ("chat", 256)
    assert kinds["all-minilm-l6-v2"][0] == "embedding"


def nobody(_post, _service, _engines):
    raise AssertionError("nothing is served")


@pytest.mark.parametrize(("file", "options", "words"), [
    ("embed", {"n_ctx": 97}, "n_ctx is 97, and this model reads texts of 96 tokens"),
    ("embed", {"lora": (Adapter(path=SMOL),)}, "`lora` is for models that write text"),
    ("embed", {"draft_model": SMOL}, "`draft_model` is for models that write text"),
    ("embed", {"kv_cells": 512}, "`kv_cells` is for models that write text: leave it out"),
    ("embed", {"cache_ram_mb": 0}, "`cache_ram_mb` is for models that write text: leave it out"),
    ("rank", {"cache_disk_mb": 9}, "it ranks documents; `cache_disk_mb` is for models that write"),
    ("embed", {"kv_type_k": "f16"}, "`kv_type_k` is for models that write"),
    ("rank", {"kv_type_v": "q8_0"}, "`kv_type_v` is for models that write"),
    ("embed", {"speculation": "off"}, "`speculation` is for models that write"),
    ("embed", {"max_stall_ms": 100}, "`max_stall_ms` is for models that write"),
    ("rank", {"pooling": "mean"}, "`pooling` is for embedding models"),
])  # fmt: skip
def test_options_that_would_be_ignored_are_refused(served, files, file, options, words):
    models = {"m": Model(model=str(files / f"{file}.gguf"), **options)}
    with pytest.raises(SettingsError, match=words):
        served(nobody, models=models)


def test_an_assistant_needs_a_model_that_writes(served, files):
    models = {"embed": Model(model=str(files / "embed.gguf"))}
    with pytest.raises(SettingsError, match=r"assistants.a: its model 'embed' embeds texts"):
        served(nobody, models=models, assistants={"a": Assistant(model="embed")})


def test_the_kind_is_the_files_and_pooling_makes_an_embedding_model(files):
    def kind(name, **options):
        return pooled.kind_of(read_header(files / f"{name}.gguf"), Model(**options))

    assert [kind(name) for name in ("embed", "mute", "rank", "last")] == [
        "embedding", "text", "rerank", "embedding",
    ]  # fmt: skip
    assert kind("mute", pooling="cls") == "embedding"
    with pytest.raises(InvalidGGUF, match="no classifier"):
        kind("headless")


def test_an_encoder_that_says_no_pooling_is_embedded_with_the_operators(served, files):
    async def scenario(post, _service, _):
        return (await post("/v1/embeddings", model="mute", input="the cat")).json()

    path = str(files / "mute.gguf")
    answer = served(scenario, real=True, models={"mute": Model(model=path, threads=1, pooling="cls")})
    tokens = [2, *tiny.tokenize("the cat", files), 3]
    expected = tiny.hidden("bert", tiny.bert_weights(head=False, seed=1), tokens)[0]
    np.testing.assert_allclose(answer["data"][0]["embedding"], expected / np.linalg.norm(expected), atol=1e-4)
    with pytest.raises(ModelLoadFailed, match="pooling"):
        served(nobody, real=True, models={"mute": Model(model=path)})


def test_the_longest_text_is_chosen_from_file_and_memory(files):
    pieces = [read_header(files / "embed.gguf")]
    weights = pooled.cost(pieces, 96, 64).weights_bytes

    def n_ctx(room_bytes, **options):
        model = Model(**options)
        return pooled.config("m", "embedding", model, pieces, room=Bytes(room_bytes), on_gpu=False).n_ctx

    assert n_ctx(20 * GB) == 96
    pieces[0].metadata["bert.context_length"] = 8192  # pyright: ignore[reportIndexIssue]
    assert n_ctx(20 * GB) == 2048
    assert n_ctx(20 * GB, n_ctx=8192) == 8192
    middle = 2 * pooled.cost(pieces, 1024, 64).total_bytes + weights
    assert n_ctx(middle) == 1024
    assert n_ctx(1) == 256
    sizes = [pooled.cost(pieces, tokens, 64).total_bytes for tokens in (256, 512, 1024, 2048, 8192)]
    assert sizes == sorted(sizes)


def test_an_embedding_model_goes_to_the_gpu_as_far_as_it_fits(files):
    pieces = [read_header(files / "embed.gguf")]
    every = placement.n_layers(pieces[0])

    def layers(device_bytes: int, **options):
        room = Bytes(20 * GB, device_bytes)
        return pooled.config("m", "embedding", Model(**options), pieces, room=room, on_gpu=True).n_gpu_layers

    assert layers(20 * GB) == every
    assert layers(0) == 0
    assert layers(20 * GB, gpu_layers=1) == 1
    assert layers(20 * GB, gpu_layers=99) == every
    part, whole = (pooled.cost(pieces, 256, 64, count).device_bytes for count in (every - 1, every))
    assert part < whole
    assert layers(part) == layers(whole - 1) == every - 1
    on_host, on_both = (pooled.cost(pieces, 96, 64, count).place for count in (0, every))
    assert on_host.device == 0 < on_both.device
