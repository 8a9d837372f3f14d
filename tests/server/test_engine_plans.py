"""Names of models and adapters -> engines: what is shared, what is converted, what an adapter changes."""

import asyncio
import json
import os

import httpx
import numpy as np
import pytest
from safetensors.numpy import save_file

from engine import wire
from engine.stats import EngineStats, SlotStats
from models.errors import ModelsError
from models.footprint import PROCESS_BYTES
from models.placement import Bytes
from models.store import Store
from server import embedding
from server.app import create_app
from server.budget import budget, embedder_bytes
from server.engines import plan
from server.in_process import BASE_URL, InProcess
from server.machine import Machine
from server.service import opened
from server.settings import HTTP, Adapter, Assistant, Embedder, Model, Settings, SettingsError, complete

SMOL = "smollm2-135m-instruct"


@pytest.fixture
def store(asset_home, tmp_path) -> Store:
    """A store of its own with the pulled models."""
    (tmp_path / "models").symlink_to(asset_home / "models")
    return Store(tmp_path)


@pytest.fixture
def adapter(tmp_path):
    """A PEFT LoRA adapter for SmolLM2 that changes much."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16, "target_modules": ["o_proj"],
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "bias": "none",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    random = np.random.default_rng(1)
    name = "base_model.model.model.layers.29.self_attn.o_proj.lora_{}.weight"
    tensors = {
        name.format("A"): random.normal(size=(4, 576)).astype(np.float32),
        name.format("B"): random.normal(size=(576, 4)).astype(np.float32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def settings(adapter, **fields) -> Settings:
    assistants = {
        "same": Assistant(model=SMOL, temperature=0.0, max_tokens=8),
        "tuned": Assistant(model=SMOL, lora=(str(adapter),), temperature=0.0, max_tokens=8),
    }
    models = {SMOL: Model(n_ctx=256, n_parallel=1, threads=1, **fields)}
    return complete(Settings(models=models, assistants=assistants), "test")


def test_assistants_share_the_engine_of_their_model_unless_they_add_adapters(store, adapter):
    plans = plan(settings(adapter), store)
    assert plans["same"].config == plans[SMOL].config
    assert plans["tuned"].config != plans[SMOL].config
    ((converted, scale),) = plans["tuned"].config.lora
    assert (converted.suffix, scale) == (".gguf", 1.0)
    assert plans[SMOL].control.search("a <|im_end|> b")
    assert not plans[SMOL].control.search("an ordinary sentence")


def test_an_adapter_is_converted_once_and_again_when_it_changes(store, adapter):
    first = plan(settings(adapter), store)["tuned"].config.lora[0][0]
    written = first.stat().st_mtime_ns
    assert plan(settings(adapter), store)["tuned"].config.lora[0][0] == first
    assert first.stat().st_mtime_ns == written
    (adapter / "README.md").write_text("changed")
    assert plan(settings(adapter), store)["tuned"].config.lora[0][0] != first


def test_adapters_of_model_and_assistant_add_up_with_their_scales(store, adapter):
    own = (Adapter(path=str(adapter), scale=0.5),)
    plans = plan(settings(adapter, lora=own), store)
    assert [scale for _, scale in plans[SMOL].config.lora] == [0.5]
    assert [scale for _, scale in plans["tuned"].config.lora] == [0.5, 1.0]


def test_what_is_no_model_or_adapter_is_refused_before_anything_starts(store, adapter, smollm2_gguf):
    for model, lora in [("nope", ()), (str(adapter), ()), (SMOL, ("nope",)), (SMOL, (str(smollm2_gguf),))]:
        with pytest.raises(ModelsError):
            plan(Settings(models={"m": Model(model=model, lora=lora)}), store)


def beside(adapter) -> Settings:
    """The adapter by name, for requests and an assistant that ask for it."""
    both = {"odd": str(adapter), "even": Adapter(path=str(adapter), scale=2.0)}
    models = {SMOL: Model(n_ctx=256, n_parallel=2, threads=1, adapters=both)}
    assistants = {
        "tuned": Assistant(model=SMOL, adapter="odd"),
        "soft": Assistant(model=SMOL, adapter="odd", adapter_scale=0.25),
        "mute": Assistant(model=SMOL, adapter="odd", adapter_scale=0),
    }
    return complete(Settings(models=models, assistants=assistants), "test")


def test_adapters_beside_the_model_share_its_engine_and_are_known_by_name(store, adapter):
    plans = plan(beside(adapter), store)
    assert plans["tuned"] == plans[SMOL]
    assert plans["soft"].config == plans[SMOL].config, "a scale is a request's, not the engine's"
    (name, path), _ = plans[SMOL].config.adapters
    assert (name, path.suffix) == ("odd", ".gguf")
    assert plans[SMOL].adapter_scales == {"odd": 1.0, "even": 2.0}
    assert plans[SMOL].config.lora == ()
    with_it, without = plans[SMOL].footprint, plan(settings(adapter), store)[SMOL].footprint
    assert with_it.weights_bytes == without.weights_bytes + 2 * path.stat().st_size


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model": SMOL}, ()),
        ({"model": "tuned"}, (("odd", 1.0),)),
        ({"model": "tuned", "adapter": ""}, ()),
        ({"model": "soft"}, (("odd", 0.25),)),
        ({"model": "soft", "adapter": "odd"}, (("odd", 0.25),)),
        ({"model": "soft", "adapter": "even"}, (("even", 2.0),)),
        ({"model": "soft", "adapter_scale": 3}, (("odd", 3.0),)),
        ({"model": "soft", "adapter": ""}, ()),
        ({"model": "mute"}, (("odd", 0.0),)),
        ({"model": SMOL, "adapter": "odd"}, (("odd", 1.0),)),
        ({"model": SMOL, "adapter": "odd", "adapter_scale": 0.5, "n": 2}, (("odd", 0.5),)),
        ({"model": SMOL, "adapter": "nope"}, "'nope' is not loaded; there are: odd, even"),
        ({"model": SMOL, "adapter_scale": 2}, "adapter_scale needs an `adapter`"),
        ({"model": SMOL, "adapter": 3}, "adapter"),
        ({"model": SMOL, "adapter": "odd", "adapter_scale": 101}, "adapter_scale"),
    ],
)
def test_a_request_or_its_assistant_names_the_adapter(store, adapter, make_engine, fields, named):
    engine = make_engine()

    async def start(_config):
        return engine

    async def ask():
        async with (
            opened(beside(adapter), store=store, start=start) as service,
            httpx.AsyncClient(transport=InProcess(create_app(service)), base_url=BASE_URL) as client,
        ):
            body = {"messages": [{"role": "user", "content": "Hi"}]} | fields
            return await client.post("/v1/chat/completions", json=body)

    response = asyncio.run(ask())
    if isinstance(named, str):
        assert response.status_code == 400
        error = response.json()["error"]
        assert named in error["message"] + error["param"]
        assert engine.requests == []
    else:
        assert response.status_code == 200
        assert [request.adapters for request in engine.requests] == [named] * fields.get("n", 1)
        sent = wire.frame(wire.Submit(1, engine.requests[0]))
        assert [each.request.adapters for each in wire.messages(bytearray(sent))] == [named]


def test_adapters_are_told_where_models_and_engines_are(store, adapter, make_engine):
    engine = make_engine()

    async def start(_config):
        return engine

    async def told():
        running = (
            SlotStats("writing", 9, adapters=(("odd", 0.25),)),
            SlotStats("prompt", 9),
            SlotStats("idle", 9),
        )
        return EngineStats(2, 0, 3, 90, 18, 9, slots=running)

    engine.stats = told

    async def ask():
        async with (
            opened(beside(adapter), store=store, start=start) as service,
            httpx.AsyncClient(transport=InProcess(create_app(service)), base_url=BASE_URL) as client,
        ):
            models = (await client.get("/v1/models")).json()["data"]
            return {each["id"]: each for each in models}, (await client.get("/v1/engine")).json()["data"]

    models, (found,) = asyncio.run(ask())
    defaults = [{"name": "odd", "scale": 1.0}, {"name": "even", "scale": 2.0}]
    assert models[SMOL]["adapters"] == models["tuned"]["adapters"] == defaults
    assert "adapter" not in models[SMOL]
    assert models["tuned"]["adapter"] == defaults[0]
    assert models["soft"]["adapter"] == models["soft"]["adapters"][0] == {"name": "odd", "scale": 0.25}
    scales = {SMOL: 1.0, "tuned": 1.0, "soft": 0.25, "mute": 0.0}
    assert found["adapters"] == [
        {"name": "odd", "default_scales": scales, "running": 1},
        {"name": "even", "default_scales": dict.fromkeys(scales, 2.0), "running": 0},
    ]


def test_an_adapter_beside_the_model_changes_the_answers_that_ask_for_it_and_no_other(store, adapter):
    async def ask_all() -> list[str]:
        async with opened(beside(adapter), store=store) as service:
            transport = InProcess(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=120) as client:
                bodies = [{"model": SMOL}, {"model": "tuned"}, {"model": SMOL, "adapter": "odd"}]
                bodies += [{"model": "tuned", "adapter": ""}, {"model": "tuned", "adapter_scale": 0.0}]
                bodies += [{"model": "mute"}]
                question = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
                question |= {"temperature": 0, "max_tokens": 8}
                asked = [client.post("/v1/chat/completions", json=question | body) for body in bodies]
                answers = [response.json() for response in await asyncio.gather(*asked)]
                return [answer["choices"][0]["message"]["content"] for answer in answers]

    base, tuned, named, without, scaled_to_nothing, mute = asyncio.run(ask_all())
    assert base == without == scaled_to_nothing == mute
    assert tuned == named != base


def test_an_assistant_with_an_adapter_answers_otherwise_than_its_model(store, adapter):
    async def ask_both() -> list[str]:
        async with opened(settings(adapter), store=store) as service:
            assert list(service.roster.standings()) == [SMOL, "tuned"]
            transport = InProcess(create_app(service))
            async with httpx.AsyncClient(transport=transport, base_url=BASE_URL, timeout=120) as client:
                texts = []
                for model in (SMOL, "same", "tuned"):
                    body = {
                        "model": model,
                        "messages": [{"role": "user", "content": "What is the capital of France?"}],
                    }
                    body |= {"temperature": 0, "max_tokens": 8}
                    answer = (await client.post("/v1/chat/completions", json=body)).json()
                    texts.append(answer["choices"][0]["message"]["content"])
                return texts

    base, same, tuned = asyncio.run(ask_both())
    assert base
    assert same == base
    assert tuned != base


def test_saved_prefixes_are_for_the_adapters_that_may_be_named_as_they_are_now(store, adapter):
    def folder(**fields):
        models = {SMOL: Model(n_ctx=256, n_parallel=1, cache_disk_mb=10, **fields)}
        return plan(complete(Settings(models=models), "test"), store)[SMOL].config.cache_folder

    before = folder(adapters={"legal": str(adapter)})
    assert before.parent == store.root / "cache" / "prefixes"
    assert before == folder(adapters={"legal": str(adapter)})
    assert before != folder(adapters={"other": str(adapter)})
    assert before != folder(adapters={"legal": str(adapter)}, gpu_layers=0)
    os.utime(adapter / "adapter_model.safetensors", (1, 1))
    assert before != folder(adapters={"legal": str(adapter)})


GB = 10**9
MIB = 2**20


def planned(store: Store, machine: Machine, *, server: HTTP | None = None, **fields):
    """The plan of SmolLM2 on a machine: 97 MB of weights, 189 MB of cells for its 8192 tokens."""
    models = {"m": Model(model=SMOL, **fields)}
    return plan(Settings(server=server or HTTP(), models=models), store, machine)["m"]


def test_caches_lie_in_the_hosts_memory_not_in_the_gpus(store):
    machine = Machine(200 * GB, 8, 80 * GB)
    found = planned(store, machine, cache_ram_mb=100_000)
    assert found.footprint.place.host > 100_000 * MIB
    assert found.footprint.place.device < 10 * GB
    assert found.config.n_gpu_layers == found.n_layers == 31


def test_a_model_larger_than_the_gpu_is_offloaded_in_parts_and_not_refused(store):
    whole = planned(store, Machine(20 * GB, 8, 80 * GB), n_ctx=8192, n_parallel=1).footprint.device_bytes
    tight = Machine(20 * GB, 8, int((whole - 80 * MIB) / 0.9))
    found = planned(store, tight, n_ctx=8192, n_parallel=1)
    assert (found.config.n_gpu_layers, found.config.kv_type_k) == (31, "q8_0")
    tighter = Machine(20 * GB, 8, int((whole - 150 * MIB) / 0.9))
    found = planned(store, tighter, n_ctx=8192, n_parallel=1)
    assert 0 < found.config.n_gpu_layers < 31
    assert found.footprint.place.within(tighter.budget(None))
    assert (found.config.n_ctx, found.config.kv_type_k) == (8192, "f16")
    none = planned(store, Machine(20 * GB, 8, 100 * MIB), n_ctx=8192, n_parallel=1)
    assert (none.config.n_gpu_layers, none.footprint.device_bytes) == (0, 0)


def test_layers_that_stay_on_the_host_need_no_room_on_the_gpu(store):
    found = planned(store, Machine(20 * GB, 8, 100 * MIB), gpu_layers=0)
    assert (found.config.n_gpu_layers, found.footprint.device_bytes) == (0, 0)
    with pytest.raises(SettingsError, match=r"needs \d\.\d GB of GPU memory .*: lower its gpu_layers"):
        planned(store, Machine(20 * GB, 8, 100 * MIB), gpu_layers=31)
    with pytest.raises(SettingsError, match=r"of GPU memory and all models together may take 0\.2 GB"):
        planned(store, Machine(20 * GB, 8, 80 * GB), server=HTTP(gpu_memory_budget_mb=200), gpu_layers=31)


def test_without_a_gpu_the_number_of_layers_is_nobodys_choice(store):
    assert planned(store, Machine(20 * GB, 8)).config.n_gpu_layers is None
    assert planned(store, Machine(20 * GB, 8), gpu_layers=5).footprint.device_bytes == 0


def test_more_requests_at_once_only_where_all_is_on_the_gpu(store):
    assert planned(store, Machine(20 * GB, 8, 80 * GB)).config.n_parallel == 32
    assert planned(store, Machine(20 * GB, 8, 80 * GB), gpu_layers=30).config.n_parallel == 8


def test_small_cells_are_chosen_where_the_context_needs_them_and_saved_apart(store):
    roomy = planned(store, Machine(20 * GB, 2), n_parallel=1, cache_disk_mb=1)
    assert (roomy.config.kv_type_k, roomy.config.kv_type_v) == ("f16", "f16")
    tight = planned(store, Machine(int(2.52 * GB), 2), n_parallel=1, cache_ram_mb=900, cache_disk_mb=1)
    assert (tight.config.kv_type_k, tight.config.kv_type_v, tight.config.n_ctx) == ("q8_0", "q8_0", 8192)
    assert tight.config.cache_folder != roomy.config.cache_folder
    given = planned(store, Machine(20 * GB, 2), kv_type_k="q4_0", kv_type_v="bf16")
    assert (given.config.kv_type_k, given.config.kv_type_v, given.why_cells) == ("q4_0", "bf16", "")


def test_a_draft_model_is_counted_with_all_that_it_takes(store):
    machine = Machine(20 * GB, 2)
    options = {"n_ctx": 1024, "n_parallel": 2}
    alone, drafted = (
        planned(store, machine, **options, **more).footprint for more in ({}, {"draft_model": SMOL})
    )
    assert drafted.weights_bytes == 2 * alone.weights_bytes
    assert drafted.kv_bytes == 2 * alone.kv_bytes
    assert alone.compute_bytes < drafted.compute_bytes == 2 * alone.compute_bytes - PROCESS_BYTES
    assert planned(store, machine, **options, draft_model=SMOL, speculation="off").footprint == alone


def test_the_embedder_takes_its_part_of_the_budget(store):
    settings = Settings(embedder=Embedder(model="all-minilm-l6-v2"))
    taken = embedder_bytes(settings, store, Machine(20 * GB, 2))
    assert 91_000_000 + 300 * MIB < taken.host < GB
    assert taken.device == 0
    assert budget(settings, store, Machine(20 * GB, 2)) == Bytes(16 * GB) - taken
    assert budget(settings, store, Machine(GB // 10, 2)) == Bytes(0)
    nowhere = Settings(embedder=Embedder(model="nope"))
    assert budget(nowhere, store, Machine(20 * GB, 2)) == Bytes(16 * GB)
    assert embedding.memory(store.resolve_embedder("all-minilm-l6-v2"), on_gpu=True).device > 91_000_000
