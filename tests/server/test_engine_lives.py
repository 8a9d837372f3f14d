"""Engines behind the API: listed unloaded, loaded by a request, held while it runs, told in /v1/engine."""

import asyncio
import json

import httpx
import pytest

from engine.request import ModelLoadFailed
from models.store import Store
from server.app import create_app
from server.auth import Keys, accept
from server.in_process import BASE_URL, InProcess
from server.machine import Machine
from server.service import opened
from server.settings import HTTP, Assistant, Model, Settings, SettingsError, complete

SMOL = "smollm2-135m-instruct"
GB, MB = 10**9, 10**6  # the embedder takes 0.6 GB of what there is


class Yard:
    """A service over fake engines. `starts` are the engines begun; `fails` what the next starts raise."""

    def __init__(self, make_engine) -> None:
        self.make_engine = make_engine
        self.starts = []
        self.fails: Exception | None = None
        self.loading: asyncio.Event | None = None

    async def start(self, config):
        if self.loading:
            await self.loading.wait()
        if self.fails:
            raise self.fails
        engine = self.make_engine()
        engine.config = config
        self.starts.append(engine)
        return engine


@pytest.fixture
def yard(make_engine):
    return Yard(make_engine)


@pytest.fixture
def lives(asset_home, yard):
    """A function: runs `scenario(client, service)` while models are served."""

    def run(scenario, *, available_bytes: int = 20 * GB, keys=(), **fields):
        settings = complete(Settings(**fields), "test")

        async def main():
            async with opened(
                settings,
                keys=Keys([accept(name, key) for name, key in keys]),
                store=Store(asset_home),
                start=yard.start,
                machine=Machine(available_bytes, 2),
            ) as service:
                transport = InProcess(create_app(service))
                async with httpx.AsyncClient(transport=transport, base_url=BASE_URL) as client:
                    result = await scenario(client, service)
            assert not any(engine.alive for engine in yard.starts)
            return result

        return asyncio.run(asyncio.wait_for(main(), 30))

    return run


def ask(model: str, **fields) -> dict:
    return {"json": {"model": model, "messages": [{"role": "user", "content": "Hi"}]} | fields}


CHAT = "/v1/chat/completions"
TWO = {"a": Model(model=SMOL, n_ctx=1024), "b": Model(model=SMOL, n_ctx=2048)}


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0)


async def states(client) -> dict[str, str]:
    return {each["id"]: each["state"] for each in (await client.get("/v1/engine")).json()["data"]}


def test_several_models_are_listed_without_being_loaded_and_healthy(lives, yard):
    async def scenario(client, _service):
        listed = {model["id"]: model for model in (await client.get("/v1/models")).json()["data"]}
        assert (await client.get("/v1/models/b")).json() == listed["b"]
        assert listed["b"] | {"created": 0} == {
            "id": "b", "object": "model", "created": 0, "owned_by": "lq", "kind": "chat",
            "n_ctx": 2048, "max_model_len": 2048, "n_ctx_train": 8192, "n_params": 134515008,
            "size_bytes": 96576768, "architecture": "llama", "description": "llama 135M Q4_1",
        }  # fmt: skip
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert 'lq_engine_up{model="b"} 0.0' in (await client.get("/metrics")).text
        assert await states(client) == {"a": "unloaded", "b": "unloaded"}
        assert yard.starts == []

    lives(scenario, models=TWO)


@pytest.mark.parametrize("stream", [False, True])
def test_the_first_request_loads_its_model_and_no_other(lives, yard, stream):
    async def scenario(client, _service):
        response = await client.post(CHAT, **ask("b", stream=stream))
        assert response.status_code == 200
        assert "Hel" in response.text
        assert [engine.config.n_ctx for engine in yard.starts] == [2048]
        assert await states(client) == {"a": "unloaded", "b": "ready"}
        await client.post("/v1/completions", json={"model": "b", "prompt": "x", "stream": stream})
        assert len(yard.starts) == 1
        engine = (await client.get("/v1/engine")).json()["data"][1]
        assert (engine["leases"], engine["waiting"]) == (0, 0)

    lives(scenario, models=TWO)


def test_the_only_model_and_those_marked_are_loaded_at_start(lives):
    async def scenario(client, _service):
        return await states(client)

    assert lives(scenario, models={"a": Model(model=SMOL)}) == {"a": "ready"}
    assert lives(scenario, models={"a": Model(model=SMOL, preload=False)}) == {"a": "unloaded"}
    marked = TWO | {"c": Model(model=SMOL, n_ctx=512, preload=True)}
    assert lives(scenario, models=marked) == {"a": "unloaded", "b": "unloaded", "c": "ready"}


def test_of_those_marked_as_many_as_fit_are_loaded_at_start(lives):
    async def scenario(client, _service):
        return await states(client)

    each = Model(model=SMOL, n_ctx=1024, n_parallel=1, cache_ram_mb=0, preload=True)  # 0.22 GB
    models = {"a": each, "b": Model(model=SMOL, n_ctx=1000, n_parallel=1, cache_ram_mb=0, preload=True)}
    assert lives(scenario, models=models, available_bytes=1300 * MB) == {"a": "ready", "b": "ready"}
    assert lives(scenario, models=models, available_bytes=1070 * MB) == {"a": "ready", "b": "unloaded"}


def test_a_model_too_large_stops_the_start_if_it_was_to_be_loaded_and_else_its_requests(lives, yard):
    large = Model(model=SMOL, n_ctx=2**24, n_parallel=1)
    message = (
        r"the model 'a' needs 1\d\d\.\d GB of memory and all models together may take 15\.4 GB: lower its"
    )

    async def nothing(_client, _service):
        pass

    async def scenario(client, _service):
        response = await client.post(CHAT, **ask("a"))
        assert (response.status_code, response.headers["x-should-retry"]) == (503, "false")
        assert (await client.post(CHAT, **ask("b"))).status_code == 200
        return response.json()["error"]

    with pytest.raises(SettingsError, match=message):
        lives(nothing, models={"a": large})
    assert yard.starts == []
    error = lives(scenario, models={"a": large, "b": TWO["b"]})
    assert (error["code"], error["param"]) == ("model_too_large", "model")
    assert "memory_budget_mb" in error["message"]
    roomy = HTTP(memory_budget_mb=1_000_000)
    lives(nothing, models={"a": large}, server=roomy)
    assert len(yard.starts) == 2


def test_one_model_makes_room_for_another_when_nobody_uses_it(lives, yard):
    async def scenario(client, service):
        for name in ("a", "b", "a"):
            assert (await client.post(CHAT, **ask(name))).status_code == 200
            assert (await states(client))[name] == "ready"
        assert [engine.alive for engine in yard.starts] == [False, False, True]
        found = (await client.get("/v1/engine")).json()
        assert found["memory_held_bytes"] == found["data"][0]["memory"]["total_bytes"]
        assert found["memory_held_bytes"] < found["memory_budget_bytes"] == service.roster.fleet.budget.host
        assert (found["gpu_memory_held_bytes"], found["gpu_memory_budget_bytes"]) == (0, 0)

    models = {
        name: Model(model=SMOL, n_ctx=n_ctx, n_parallel=1) for name, n_ctx in [("a", 1024), ("b", 2048)]
    }
    lives(scenario, models=models, available_bytes=1700 * MB)


def test_a_stream_holds_its_engine_until_it_has_ended_or_its_client_left(lives, yard):
    async def scenario(client, service):
        fleet, plans = service.roster.fleet, service.roster.plans

        def users():
            return fleet.standing(plans["a"].config).users

        await client.post(CHAT, **ask("a"))
        (engine,) = yard.starts
        for leaves in (False, True):
            engine.pause = asyncio.Event()
            async with client.stream("POST", CHAT, **ask("a", stream=True)) as response:
                lines = response.aiter_lines()
                while "Hel" not in await anext(lines):
                    pass
                assert users() == 1
                other = asyncio.create_task(client.post(CHAT, **ask("b")))
                await until(lambda: service.roster.standings()["b"].waiting)
                assert not other.done()  # there is no room while the stream goes on
                assert engine.alive
                if not leaves:
                    engine.pause.set()
                    async for _ in lines:
                        pass
            assert (await other).status_code == 200
            assert not engine.alive
            await client.post(CHAT, **ask("a"))
            engine = yard.starts[-1]
        assert users() == 0

    models = {
        name: Model(model=SMOL, n_ctx=n_ctx, n_parallel=1) for name, n_ctx in [("a", 1024), ("b", 2048)]
    }
    lives(scenario, models=models, available_bytes=1700 * MB)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"prompt": "nope"}, 400),
        ({"collection": "nope"}, 404),
        ({"logit_bias": {"99999999": 1}}, 400),
        ({"n": 8, "stream": True}, 200),
        ({"max_tokens": 1, "max_completion_tokens": 2, "stream": True}, 400),
    ],
)
def test_however_a_request_ends_it_gives_the_engine_back(lives, fields, status):
    async def scenario(client, service):
        assert (await client.post(CHAT, **ask("a", **fields))).status_code == status
        (standing,) = service.roster.standings().values()
        assert (standing.users, standing.waiting) == (0, 0)

    lives(scenario, models={"a": Model(model=SMOL)})


def test_a_client_that_leaves_while_its_model_loads_takes_nothing_along(lives, yard):
    async def scenario(client, service):
        yard.loading = asyncio.Event()
        asking = [asyncio.create_task(client.post(CHAT, **ask("a"))) for _ in range(2)]
        await until(lambda: service.roster.standings()["a"].waiting == 2)
        assert await states(client) == {"a": "loading", "b": "unloaded"}
        assert (await client.get("/health")).status_code == 200
        asking[0].cancel()
        await asyncio.gather(asking[0], return_exceptions=True)
        assert service.roster.standings()["a"].waiting == 1
        yard.loading.set()
        assert (await asking[1]).status_code == 200
        assert len(yard.starts) == 1
        assert service.roster.standings()["a"].users == 0

    lives(scenario, models=TWO)


def test_a_model_that_does_not_load_is_told_without_paths_and_tried_again(lives, yard):
    async def scenario(client, service):
        path = service.roster.plans["a"].config.model_path
        yard.fails = ModelLoadFailed(f"{path}: unknown architecture")
        for _ in range(2):
            response = await client.post(CHAT, **ask("a"))
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "model_not_loaded")
            assert error["message"] == f"the model 'a' cannot be loaded: {path.name}: unknown architecture"
        engine = (await client.get("/v1/engine")).json()["data"][0]
        assert (engine["state"], engine["problem"]) == ("failed", f"{path.name}: unknown architecture")
        assert (await client.get("/health")).status_code == 200
        yard.fails = None
        assert (await client.post(CHAT, **ask("a"))).status_code == 200
        assert (await states(client))["a"] == "ready"

    lives(scenario, models=TWO)


def test_an_unknown_model_or_a_malformed_request_loads_nothing(lives, yard):
    async def scenario(client, _service):
        assert (await client.post(CHAT, **ask("nope"))).status_code == 404
        assert (await client.post(CHAT, **ask("a", temperature=9))).status_code == 400
        assert (await client.post("/v1/embeddings", json={"model": "a", "input": "x"})).status_code == 400

    lives(scenario, models=TWO)
    assert yard.starts == []


def test_a_process_that_died_is_not_healthy(lives, yard):
    async def scenario(client, _service):
        await client.post(CHAT, **ask("a"))
        yard.starts[0].alive = False
        response = await client.get("/health")
        assert (response.status_code, response.json()["engines_down"]) == (503, ["a", "c"])
        assert (await states(client))["a"] == "down"
        assert (await client.get("/v1/engine")).json()["data"][0]["stats"] is None

    lives(scenario, models=TWO, assistants={"c": Assistant(model="a")})


def test_the_engine_route_tells_what_was_chosen_and_what_goes_on(lives):
    async def scenario(client, _service):
        await client.post(CHAT, **ask("terse"))
        return (await client.get("/v1/engine")).json()["data"]

    model = Model(model=SMOL, n_parallel=2, kv_type_k="q8_0", keep_alive="1h")
    (found,) = lives(scenario, models={"a": model}, assistants={"terse": Assistant(model="a")})
    assert found.pop("idle_s") >= 0
    memory = found.pop("memory")
    assert memory["weights_bytes"] == 96576768
    assert memory["kv_bytes"] == 16384 * 23040 * (34 / 32 + 2) / 4
    assert (total := memory.pop("total_bytes")) == sum(memory.values())
    assert (memory["gpu_bytes"], total > 0) == (0, True)
    config, stats = found.pop("config"), found.pop("stats")
    assert 0 <= found.pop("stats_age_s") < 60
    for name in ("features", "hit_rates", "queue", "slots"):
        assert found.pop(name) is not None
    assert found == {
        "id": "a", "object": "engine", "models": ["a", "terse"], "state": "ready", "problem": None,
        "n_ctx": 8192, "n_ctx_train": 8192, "n_parallel": 2, "kv_cells": 16384, "n_threads": 1, "gpu": None,
        "n_layers": 0, "n_gpu_layers": 0, "kv_type_k": "q8_0", "kv_type_v": "f16",
        "kv_type_reason": "all of the context fits", "slow_attention": None,
        "leases": 0, "waiting": 0, "keep_alive_s": 3600.0, "preload": True,
        "adapters": [],
    }  # fmt: skip
    assert config["model_path"].endswith(".gguf")
    assert "/" not in json.dumps(config)
    assert (config["kv_type_k"], config["n_ctx"]) == ("q8_0", 8192)
    assert (stats["running"], stats["waiting"], stats["kv_cells_total"]) == (1, 2, 100)


def test_the_engine_route_needs_the_key_and_is_documented(lives):
    async def scenario(client, _service):
        assert (await client.get("/v1/engine")).status_code == 401
        allowed = await client.get("/v1/engine", headers={"authorization": "Bearer secret-key"})
        assert allowed.status_code == 200
        schema = (await client.get("/docs/openapi.json")).json()
        answer = schema["paths"]["/v1/engine"]["get"]["responses"]["200"]
        assert answer["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/EngineList"}
        assert "keep_alive_s" in schema["components"]["schemas"]["EngineState"]["properties"]

    lives(scenario, models={"a": Model(model=SMOL)}, keys=[("me", "secret-key")])


def test_engines_that_two_names_share_stay_as_long_as_either_wants(lives):
    async def scenario(client, _service):
        return (await client.get("/v1/engine")).json()["data"]

    models = {"a": Model(model=SMOL, keep_alive="1m"), "b": Model(model=SMOL, keep_alive="2m", preload=True)}
    (found,) = lives(scenario, models=models)
    assert (found["models"], found["keep_alive_s"], found["preload"]) == (["a", "b"], 120, True)
    models["b"] = Model(model=SMOL, keep_alive="forever")
    (found,) = lives(scenario, models=models)
    assert found["keep_alive_s"] is None
