"""What is checked before anything is served: collections, embedders, hosts, keys."""

import asyncio

import httpx
import pytest

from models.missing import UnknownModel
from models.store import Store
from rag import ingest
from server.app import create_app
from server.auth import Keys
from server.in_process import BASE_URL, InProcess
from server.service import Service, fingerprint, opened
from server.settings import HTTP, Assistant, Embedder, Settings, SettingsError, with_models

SMOL = "smollm2-135m-instruct"
MINILM = "all-minilm-l6-v2"


@pytest.fixture
def store(asset_home, tmp_path) -> Store:
    """A store with the default model and no embedder."""
    (tmp_path / "home" / "models").mkdir(parents=True)
    (tmp_path / "home" / "models" / SMOL).symlink_to(asset_home / "models" / SMOL)
    return Store(tmp_path / "home")


@pytest.fixture
def with_embedder(store, asset_home):
    (store.models / MINILM).symlink_to(asset_home / "models" / MINILM)


@pytest.fixture
def collection(store, tmp_path, make_embedder):
    """A collection `house`, built with an embedder called `mine` whose fingerprint is `f`."""
    (tmp_path / "a.md").write_text("# A\n\nThe key is under the mat.\n")
    ingest.index(store.root / "collections" / "house", [tmp_path / "a.md"], embedder=make_embedder("mine"))


@pytest.fixture
def started(store, make_engine):
    """A function: settings -> what `use(client)` gives while they are served. `engines` are those begun."""

    def start(use, *, load_embedder=None, **fields):
        settings = with_models(Settings(**fields), {})

        async def engine(_config):
            start.engines.append(make_engine())
            return start.engines[-1]

        async def run():
            async with opened(
                settings, keys=Keys(()), store=store, start=engine, load_embedder=load_embedder
            ) as service:
                return await use(service)

        return asyncio.run(run())

    start.engines = []
    return start


async def nothing(_service: Service) -> None:
    pass


async def ask_for_embeddings(service: Service):
    async with httpx.AsyncClient(transport=InProcess(create_app(service)), base_url=BASE_URL) as client:
        listed = [model["id"] for model in (await client.get("/v1/models")).json()["data"]]
        body = {"model": MINILM, "input": "x"}
        return listed, await client.post("/v1/embeddings", json=body)


PORTER = {"porter": Assistant(model=SMOL, collection="house")}


def test_without_the_default_embedder_chats_are_served_and_embeddings_say_what_to_pull(started):
    listed, response = started(ask_for_embeddings)
    assert listed == [SMOL]
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert f"lq pull {MINILM}" in error["message"]


@pytest.mark.usefixtures("with_embedder")
def test_an_embedder_that_is_there_is_listed_and_answers(started, make_embedder):
    loaded = []

    def load(name):
        loaded.append(name)
        return make_embedder()

    listed, response = started(ask_for_embeddings, load_embedder=load)
    assert listed == [SMOL, MINILM]
    assert response.status_code == 200
    assert loaded == [MINILM]


def test_an_embedder_that_was_asked_for_and_is_not_there_stops_the_start(started):
    with pytest.raises(SettingsError, match=r"embedder\.model: no model named 'nope'"):
        started(nothing, embedder=Embedder(model="nope"))
    assert started.engines == []


def test_an_assistant_of_an_unknown_collection_stops_the_start(started):
    for name, problem in [("house", "no collection 'house'"), ("a:b", "no name of a collection")]:
        with pytest.raises(SettingsError, match=rf"assistants\.porter: .*{problem}"):
            started(nothing, assistants={"porter": Assistant(model=SMOL, collection=name)})
    assert started.engines == []


@pytest.mark.usefixtures("collection")
def test_an_assistant_whose_collection_lost_its_embedder_stops_the_start(started):
    with pytest.raises(SettingsError, match=r"assistants\.porter: its collection 'house' .* named 'mine'"):
        started(nothing, assistants=PORTER)
    assert started.engines == []


@pytest.mark.usefixtures("collection")
def test_an_assistant_whose_collection_has_another_embedder_stops_the_start(started, make_embedder):
    with pytest.raises(SettingsError, match=r"changed since \(other\).* lq index house .*--rebuild"):
        started(nothing, assistants=PORTER, load_embedder=lambda name: make_embedder(name, "other"))
    assert started.engines == []


@pytest.mark.usefixtures("collection")
def test_an_assistant_whose_collection_is_sound_starts(started, make_embedder):
    started(nothing, assistants=PORTER, load_embedder=make_embedder)
    assert len(started.engines) == 1


@pytest.mark.usefixtures("with_embedder")
def test_an_embedder_is_called_as_the_index_calls_it(store, tmp_path, asset_home):
    from server.service import _embedder_loader

    folder = tmp_path / "elsewhere"
    folder.symlink_to(asset_home / "models" / MINILM)
    load = _embedder_loader(store)
    assert load(MINILM).name == MINILM
    assert load(str(folder)).name == str(folder)
    with pytest.raises(UnknownModel):
        load("nope")


@pytest.mark.parametrize(
    "host", ["lq.example:8000", "https://lq.example", "lq.example/", "", "*", "a b", "[::1]:80"]
)
def test_a_host_that_no_header_could_match_stops_the_start(started, host):
    with pytest.raises(SettingsError, match=r"server\.allowed_hosts: .* is no host name"):
        started(nothing, server=HTTP(allowed_hosts=(host,)))
    assert started.engines == []


def test_the_fingerprint_reads_the_packages_once(monkeypatch):
    first = fingerprint()
    monkeypatch.setattr("server.service.version", lambda _: pytest.fail("read again"))
    assert fingerprint() == first
