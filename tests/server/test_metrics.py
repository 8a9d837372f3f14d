"""What /metrics and /v1/engine say of engines: each once, as they are or were last, nothing of those gone."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.request import EngineRestarted
from engine.stats import EngineStats, SlotStats
from server.settings import Assistant, Model
from server.snapshots import Snapshots

STATS = EngineStats(
    1, 3, 2, 100, 40, 10, kv_cells_free=50, kv_cells_shared=7, prompt_tokens_total=200,
    cached_tokens_total=120, cached_slot_tokens_total=70, cached_ram_tokens_total=50, busy_s=1.5,
    guessed_tokens_total=8, right_guesses_total=2, guessing=True, waiting_by_priority=((2, 1), (0, 2)),
    stall_counts=(4, 0, 1, *[0] * 8, 2), stall_s_total=30.5,
    slots=(SlotStats("writing", 40, 30, (("legal", 0.5),), 1.25), SlotStats("idle", 10)),
)  # fmt: skip

#: What is told of an engine that is not loaded, too.
LOADED_OR_NOT = ("up", "leases", "load_waiting", "memory_bytes", "gpu_memory_bytes", "names")


def families(house) -> dict:
    return {each.name: each for each in text_string_to_metric_families(house.call("GET", "/metrics").text)}


def samples(house, name: str) -> dict[tuple[str, ...], float]:
    """Values of one metric by those of its labels."""
    found = [sample for each in families(house).values() for sample in each.samples if sample.name == name]
    return {tuple(sample.labels.values()): sample.value for sample in found}


def engine(house) -> dict:
    (found,) = house.call("GET", "/v1/engine").json()["data"]
    return found


@pytest.fixture
def shared(build):
    """One engine under three names."""
    assistants = {"terse": Assistant(model="fake")}
    return build(models={"fake": Model(), "same": Model()}, assistants=assistants)


def tells(house, stats: EngineStats) -> None:
    async def told():
        return stats

    house.engine.stats = told


def test_an_engine_is_exported_once_however_many_names_it_has(shared):
    for name in ("lq_engine_running", "lq_engine_up", "lq_engine_requests_total"):
        assert list(samples(shared, name)) == [("fake",)], name
    assert set(samples(shared, "lq_engine_names")) == {("fake", "fake"), ("fake", "same"), ("fake", "terse")}


def test_what_only_grows_is_a_counter_and_the_rest_is_not(house):
    tells(house, STATS)
    found = families(house)
    for name in (
        "requests",
        "cached_tokens",
        "right_guesses",
        "restarts",
        "busy_seconds",
        "cache_hit_tokens",
    ):
        assert found[f"lq_engine_{name}"].type == "counter", name
    for name in ("running", "kv_cells_total", "kv_cells_free", "cache_ram_bytes"):
        assert found[f"lq_engine_{name}"].type == "gauge", name
    assert samples(house, "lq_engine_busy_seconds_total") == {("fake",): 1.5}


def test_an_engine_that_is_busy_in_a_call_is_up_and_told_of_as_it_was(house, monkeypatch):
    monkeypatch.setattr("server.snapshots.ASK_S", 0.01)
    tells(house, STATS)
    assert engine(house)["stats_age_s"] >= 0

    async def never():
        await asyncio.Event().wait()

    house.engine.stats = never
    assert samples(house, "lq_engine_up") == {("fake",): 1}
    assert samples(house, "lq_engine_running") == {("fake",): 1}
    (age_s,) = samples(house, "lq_engine_stats_age_seconds").values()
    found = engine(house)
    assert found["stats"]["prompt_tokens_total"] == 200
    assert found["stats_age_s"] > age_s > 0


def test_an_engine_that_never_answered_is_up_and_nothing_else_is_known(house, monkeypatch):
    async def never():
        await asyncio.Event().wait()

    house.engine.stats = never
    monkeypatch.setattr("server.snapshots.ASK_S", 0.01)
    assert samples(house, "lq_engine_up") == {("fake",): 1}
    assert samples(house, "lq_engine_running") == {}
    found = engine(house)
    assert (found["state"], found["stats"], found["stats_age_s"], found["slots"]) == (
        "ready",
        None,
        None,
        None,
    )
    assert found["features"]["guessing"] is None


def test_an_engine_that_is_down_or_gone_leaves_no_figures(house):
    tells(house, STATS)
    assert samples(house, "lq_engine_running") == {("fake",): 1}
    house.engine.alive = False
    house.engine.stats = None  # must not be called
    assert samples(house, "lq_engine_up") == {("fake",): 0}
    left = {
        name for name in families(house) if families(house)[name].samples and name.startswith("lq_engine_")
    }
    assert left == {f"lq_engine_{each}" for each in LOADED_OR_NOT}
    assert engine(house)["stats"] is None


def test_memory_and_the_queue_of_a_model_that_loads_are_told(house):
    assert samples(house, "lq_memory_budget_bytes") == {(): 1000}
    assert samples(house, "lq_memory_held_bytes") == {(): 60}
    assert samples(house, "lq_engine_memory_bytes") == {("fake",): 60}
    assert (
        samples(house, "lq_gpu_memory_budget_bytes") == samples(house, "lq_gpu_memory_held_bytes") == {(): 0}
    )
    assert samples(house, "lq_engine_gpu_memory_bytes") == {("fake",): 0}
    assert samples(house, "lq_engine_load_waiting") == {("fake",): 0}


def test_hits_stalls_and_the_queue_are_told_by_tier_bound_and_priority(house):
    tells(house, STATS)
    hits = samples(house, "lq_engine_cache_hit_tokens_total")
    assert hits == {("fake", "slot"): 70, ("fake", "ram"): 50, ("fake", "disk"): 0}
    stalls = samples(house, "lq_engine_stall_seconds_bucket")
    assert [stalls[bound, "fake"] for bound in ("0.005", "0.01", "0.025", "10.0", "+Inf")] == [4, 4, 5, 5, 7]
    assert samples(house, "lq_engine_stall_seconds_count") == {("fake",): 7}
    assert samples(house, "lq_engine_stall_seconds_sum") == {("fake",): 30.5}
    assert samples(house, "lq_engine_queue") == {("fake", "2"): 1, ("fake", "0"): 2}


def test_the_engine_route_tells_slots_queue_rates_features(house):
    tells(house, STATS)
    info = {
        "unified": True,
        "shares_prefixes": True,
        "guesses": "lookup",
        "kernels": ("attention", "weights"),
    }
    house.engine.info = replace(house.engine.info, **info, flash_attention=True, gpu=None)
    found = engine(house)
    busy, idle = found["slots"]
    assert busy == {
        "state": "writing", "n_tokens": 40, "n_cached_tokens": 30, "adapters": {"legal": 0.5}, "age_s": 1.25,
    }  # fmt: skip
    assert idle == {"state": "idle", "n_tokens": 10, "n_cached_tokens": 0, "adapters": {}, "age_s": None}
    assert list(found["queue"].items()) == [("2", 1), ("0", 2)]
    assert found["hit_rates"] == {"all": 0.6, "slot": 0.35, "ram": 0.25, "disk": 0.0}
    assert found["features"] == {
        "unified": True, "prefix_sharing": True, "guesses": "lookup", "guessing": True, "acceptance": 0.25,
        "flash_attention": True, "kernels": ["attention", "weights"], "gpu": None,
    }  # fmt: skip
    cells = {name: found["stats"][f"kv_cells_{name}"] for name in ("used", "cached", "free", "shared")}
    assert cells == {"used": 40, "cached": 10, "free": 50, "shared": 7}
    assert not {"slots", "stall_counts", "waiting_by_priority"} & set(found["stats"])


def test_rates_of_nothing_are_null(house):
    tells(house, EngineStats(0, 0, 1, 1, 0, 0))
    found = engine(house)
    assert set(found["hit_rates"].values()) == {None}
    assert (found["features"]["acceptance"], found["queue"], found["slots"]) == (None, {}, [])


class _Engine:
    """Answers when it is told to."""

    alive, pid = True, 1

    def __init__(self) -> None:
        self.n_asked = 0
        self.answers: asyncio.Queue = asyncio.Queue()

    async def stats(self):
        self.n_asked += 1
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_an_engine_is_asked_one_question_at_a_time_and_a_late_answer_counts(monkeypatch):
    monkeypatch.setattr("server.snapshots.ASK_S", 0.001)

    async def main():
        now = [100.0]
        engine: Any = _Engine()
        asked: Any = Snapshots(clock=lambda: now[0])
        assert [await asked.of(engine) for _ in range(3)] == [None] * 3
        assert engine.n_asked == 1
        engine.answers.put_nowait(STATS)
        late = await asked.of(engine)
        now[0] += 7
        again = await asked.of(engine)
        assert (late.stats, late.age_s, again.stats, again.age_s) == (STATS, 0, STATS, 7)
        engine.answers.put_nowait(EngineRestarted("it died"))
        assert (await asked.of(engine)).age_s == 7
        engine.pid = 2
        assert await asked.of(engine) is None, "what a process said ends with it"
        assert await asked.of(None) is None

    asyncio.run(main())
