"""Options of `lq serve` -> settings, and what is pulled before it starts."""

import asyncio
from pathlib import Path
from typing import get_args, get_type_hints

import msgspec
import pytest
import typer

from lq.commands import serve
from lq.commands.serve import name_of, named_models, stocked, with_engine_options
from models.errors import ModelsError
from models.store import Store
from server.auth import Keys
from server.engines import plan
from server.machine import Machine
from server.run import announce
from server.service import opened
from server.settings import Adapter, Embedder, Model, Settings, SettingsError, complete, with_models
from tests import tiny_models as tiny

NOWHERE = Store(Path("/nonexistent"))  # what reads no file needs none
SMOL = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        (SMOL, SMOL),
        ("qwen2.5-coder", "qwen2.5-coder"),
        ("/models/My Model.gguf", "My-Model"),
        ("./smol.Q8_0.gguf", "smol.Q8_0"),
        ("smol.gguf", "smol"),
        ("/models/-.odd.gguf", "odd"),
        ("/models/.gguf", "model"),
        ("모델.gguf", "모델"),
    ],
)
def test_a_model_is_called_by_its_store_name_or_its_file(reference, name):
    assert name_of(reference) == name
    with_models(Settings(), {name: Model(model=reference)})  # is a name that the settings take


def test_models_of_the_command_line_have_their_names_and_the_adapters_of_one():
    assert named_models([], []) == {}
    assert named_models(["a", "x/b.gguf"], []) == {
        "a": Model(model="a", preload=True),
        "b": Model(model="x/b.gguf", preload=True),
    }
    adapters = (Adapter(path="one"), Adapter(path="two"))
    assert named_models(["a"], ["one", "two"]) == {"a": Model(model="a", lora=adapters, preload=True)}
    assert named_models([], ["one"]) == {SMOL: Model(model=SMOL, lora=adapters[:1], preload=True)}


def test_what_is_ambiguous_on_the_command_line_is_wrong_usage():
    with pytest.raises(typer.BadParameter, match="two models would be called 'a'"):
        named_models(["a", "x/a.gguf"], [])
    with pytest.raises(typer.BadParameter, match="whose adapter"):
        named_models(["a", "b"], ["one"])


def test_engine_options_are_set_for_every_model_and_only_when_given():
    settings = Settings(models={"a": Model(n_ctx=99), "b": Model(threads=3)})
    changed = with_engine_options(settings, NOWHERE, n_ctx=None, gpu_layers=2, threads=7)
    assert changed.models == {
        "a": Model(n_ctx=99, gpu_layers=2, threads=7),
        "b": Model(gpu_layers=2, threads=7),
    }
    assert with_engine_options(settings, NOWHERE, n_ctx=None, n_parallel=None, threads=None) == settings


def test_a_model_of_the_file_that_is_named_is_loaded_at_start_unless_the_file_says_otherwise():
    settings = Settings(models={"a": Model(n_ctx=99), "b": Model(preload=False), "c": Model()})
    models = with_models(settings, named_models(["a", "b"], [])).models
    assert {name: model.preload for name, model in models.items()} == {"a": True, "b": False, "c": None}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"keep_alive": "soon"}, ["keep_alive", "'soon' is no duration", '"10m"']),
        ({"keep_alive": "-1m"}, ["'-1m' is no duration"]),
        ({"keep_alive": "9999999999h"}, ["longer than a year", '"forever"']),
        ({"n_parallel": 1000}, ["--n-parallel", "256"]),
        ({"n_ctx": 2048, "kv_cells": 1024}, ["1024", "2048 of n_ctx"]),
        ({"kv_type_k": "q3"}, ["--kv-type-k", "'q3'"]),
        ({"draft_model": 3}, ["--draft-model"]),
        ({"gpu_layers": -1}, ["--gpu-layers"]),
        ({"max_queue": -1}, ["--max-queue"]),
    ],
)
def test_an_engine_option_that_cannot_be_is_named(options, words, asset_home):
    settings = Settings(models={"a": Model(model=SMOL)})
    with pytest.raises(SettingsError) as error:
        with_engine_options(settings, Store(asset_home), **options)
    for word in ["command line", *words]:
        assert word in str(error.value)


@pytest.fixture
def mixed(asset_home, tmp_path) -> tuple[Settings, Store]:
    """A model that writes and one that embeds texts of 96 tokens, and their store."""
    tiny.bert(tmp_path / "embed.gguf")
    models = {"smol": Model(model=SMOL), "embed": Model(model=str(tmp_path / "embed.gguf"))}
    return Settings(models=models), Store(asset_home)


TEXT = {
    "n_ctx": 256, "n_parallel": 2, "kv_cells": 300, "kv_type_k": "f16", "kv_type_v": "f16", "cache_ram_mb": 1,
    "cache_disk_mb": 1, "speculation": "off", "max_stall_ms": 50, "draft_model": SMOL,
}  # fmt: skip


def test_options_of_text_go_to_models_that_write_it_and_the_others_to_all(mixed):
    settings, store = mixed
    changed = with_engine_options(settings, store, threads=1, max_queue=9, mmap=True, **TEXT)
    everybody: dict = {"threads": 1, "max_queue": 9, "mmap": True}
    assert changed.models["smol"] == Model(model=SMOL, **everybody, **TEXT)
    assert changed.models["embed"] == Model(model=settings.models["embed"].model, **everybody)
    plans = plan(changed, store, Machine(20 * 10**9, 2))
    assert (plans["smol"].config.n_ctx, plans["embed"].config.n_ctx) == (256, 96)


def test_where_no_model_writes_the_size_of_texts_may_be_given_and_what_has_no_use_is_refused(mixed):
    settings, store = mixed
    alone = Settings(models={"embed": settings.models["embed"]})
    changed = with_engine_options(alone, store, n_ctx=64, n_parallel=4)
    assert (changed.models["embed"].n_ctx, changed.models["embed"].n_parallel) == (64, 4)
    changed = with_engine_options(alone, store, kv_cells=300)
    with pytest.raises(SettingsError, match=r"models\.embed: it embeds texts; `kv_cells` is for models that"):
        plan(changed, store, Machine(20 * 10**9, 2))


def test_every_setting_of_a_model_has_an_option_that_takes_the_same_values():
    options = {
        name: get_args(kind) for name, kind in get_type_hints(serve.serve, include_extras=True).items()
    }
    in_the_file_only = {"model", "pooling"}
    named_otherwise = {"lora", "adapters"}  # --lora, --adapter NAME=ADAPTER
    fields = {field.name: field.type for field in msgspec.inspect.type_info(Model).fields}
    assert fields.keys() - options.keys() == in_the_file_only | named_otherwise - {"lora"}
    for name in fields.keys() & options.keys() - {"lora"}:
        kinds = getattr(fields[name], "types", (fields[name],))
        for kind in kinds:
            if isinstance(kind, msgspec.inspect.IntType) and name != "keep_alive":
                assert options[name][1].min == kind.ge, name
        literals = [kind for kind in kinds if isinstance(kind, msgspec.inspect.LiteralType)]
        if literals:
            taken = {value for kind in literals for value in kind.values}
            assert set(get_args(get_args(options[name][0])[0])) == taken, name


def test_adapters_beside_the_model_are_given_by_name():
    named = named_models([], [], ["legal=out/legal", "terse=a=b.gguf"])
    adapters = {"legal": Adapter(path="out/legal"), "terse": Adapter(path="a=b.gguf")}
    assert named == {SMOL: Model(model=SMOL, adapters=adapters, preload=True)}
    for wrong in ("legal", "=x", "legal=", "a b=x"):
        with pytest.raises(typer.BadParameter, match="give NAME=ADAPTER"):
            named_models([], [], [wrong])
    with pytest.raises(typer.BadParameter, match="two adapters would be called 'a'"):
        named_models([], [], ["a=x", "a=y"])
    with pytest.raises(typer.BadParameter, match="whose adapter"):
        named_models(["a", "b"], [], ["a=x"])


@pytest.fixture
def pulled(monkeypatch, tmp_path):
    """Names that would be pulled into an empty store; those in `pulled.fails` raise."""

    class Pulled(list):
        fails: frozenset[str] = frozenset()

    names = Pulled()

    def pull(_store, name, **_):
        names.append(name)
        if name in names.fails:
            raise ModelsError(f"{name} cannot be fetched")

    monkeypatch.setenv("LQ_HOME", str(tmp_path))
    monkeypatch.setattr(Store, "pull", pull)
    return names


def test_the_default_model_and_embedder_are_pulled_where_they_are_asked_for(pulled):
    default = with_models(Settings(), {})
    stocked(default, with_embedder=True)
    assert pulled == [SMOL, MINILM]
    pulled.clear()
    stocked(default, with_embedder=False)
    assert pulled == [SMOL]
    pulled.clear()
    other = Settings(models={"mine": Model(model="x.gguf")}, embedder=Embedder(model="mine"))
    stocked(other, with_embedder=True)
    assert pulled == []


def test_what_is_in_the_store_is_not_pulled_again(pulled, asset_home, monkeypatch):
    monkeypatch.setenv("LQ_HOME", str(asset_home))
    assert stocked(with_models(Settings(), {}), with_embedder=True).root == asset_home
    assert pulled == []


def test_without_a_network_the_server_starts_without_its_embedder_but_not_without_its_model(pulled, capsys):
    pulled.fails = {MINILM}
    stocked(with_models(Settings(), {}), with_embedder=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line == f"warning: /v1/embeddings is not served: {MINILM} cannot be fetched"
    pulled.fails = {SMOL}
    with pytest.raises(ModelsError):
        stocked(with_models(Settings(), {}), with_embedder=True)


def test_the_command_pulls_both_and_serves_what_it_was_told(pulled, monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr("server.run.serve", lambda settings, *, store: served.append((settings, store)))
    (tmp_path / "lq.toml").write_text(f'[models."{SMOL}"]\nn_ctx = 77\nlora = ["own"]\n')
    serve.serve(
        models=[SMOL], config=tmp_path / "lq.toml", port=9, threads=3, lora=["more"],
        memory_budget_mb=500, keep_alive="0",
    )  # fmt: skip
    ((settings, store),) = served
    assert pulled == [SMOL, MINILM]
    assert store.root == tmp_path
    lora = (Adapter(path="own"), Adapter(path="more"))
    assert settings.models == {SMOL: Model(n_ctx=77, threads=3, lora=lora, preload=True, keep_alive="0")}
    assert (settings.server.port, settings.server.memory_budget_mb) == (9, 500)


@pytest.fixture
def announced(asset_home, make_engine, capsys):
    """A function: models -> what is said at the start of their server, on stdout and stderr."""

    def announce_models(available_bytes: int = 20 * 10**9, device_bytes: int | None = None, **models: Model):
        async def start(_config):
            return make_engine()

        async def run():
            settings = complete(Settings(models=models), "test")
            machine = Machine(available_bytes, 2, device_bytes)
            async with opened(
                settings, keys=Keys(()), store=Store(asset_home), start=start, machine=machine
            ) as service:
                announce("http://127.0.0.1:1", service)

        asyncio.run(run())
        return capsys.readouterr()

    return announce_models


@pytest.mark.parametrize(("n_ctx", "warned"), [(16384, True), (8192, False)])
def test_more_context_than_the_model_was_trained_on_is_told(announced, n_ctx, warned):
    told = announced(smol=Model(model=SMOL, n_ctx=n_ctx))
    assert "lq serves smol, " in told.out
    assert ("trained on 8192 tokens; with n_ctx 16384" in told.err) is warned


def test_what_a_model_got_is_said_in_one_line(announced):
    line, last = announced(smol=Model(model=SMOL)).out.splitlines()
    assert line == (
        "smol: 8192 tokens a request, 8 at once, f16 cells (all of the context fits), 1 thread, "
        "2.4 GB of 15.4 GB"
    )
    assert last.startswith("lq serves smol, ")


def test_what_was_shortened_or_waits_for_its_first_use_is_said_too(announced):
    small = Model(model=SMOL, n_ctx=4096, n_parallel=2, kv_cells=5000, kv_type_k="q8_0", kv_type_v="q4_0")
    lines = announced(a=small, b=Model(model=SMOL, keep_alive="90s")).out.splitlines()
    assert lines[0] == (
        "a: 4096 tokens a request (of 8192), 2 at once, 5000 tokens together, keys q8_0, values q4_0, "
        "0.8 GB of 15.4 GB, loaded on first use, unloaded after 600 s without requests"
    )
    assert lines[1].endswith("loaded on first use, unloaded after 90 s without requests")


def test_what_goes_to_the_gpu_is_said_and_what_it_takes_there(announced):
    models = {"a": Model(model=SMOL, n_ctx=4096, n_parallel=2), "b": Model(model=SMOL, gpu_layers=0)}
    lines = announced(device_bytes=2 * 10**9, **models).out.splitlines()
    assert "2 at once, f16 cells (all of the context fits), 31 of 31 layers on the GPU, " in lines[0]
    assert " of 1.8 GB on the GPU, loaded on first use" in lines[0]
    assert "layers on the GPU" not in lines[1]
    assert "0.0 GB of 1.8 GB on the GPU" in lines[1]


def test_why_cells_are_small_is_said(announced):
    line, _ = announced(
        int(2.52 * 10**9), smol=Model(model=SMOL, n_parallel=1, cache_ram_mb=900)
    ).out.splitlines()
    assert "q8_0 cells (f16 would hold " in line
    assert " tokens of 8192)" in line
