"""Types of cached keys and values: which pairs are measured, what they cost, what is recommended."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from engine.llama import KV_TYPES
from engine.request import EngineConfig, KVType
from lq.commands import serve
from models.footprint import kv_bytes_per_cell
from models.gguf import read_header
from quantize.divergence import summarise
from quantize.kv_cache import steps as kv_steps
from quantize.kv_cache.pairs import EXACT, ON_GPU, SHARE, TYPES, Measured, Pair, alone, promising, recommend
from quantize.kv_cache.plot import cache_figure
from quantize.kv_cache.report import CacheReport, advice, sections
from quantize.kv_cache.steps import Cache, CannotQuantizeCache, Text, measure_cache, refuse_narrow_heads
from quantize.measure import Backend, Passage, measure, scores_against, scores_between, some, write_reference
from quantize.pipeline import run
from quantize.plots import png
from quantize.steps import Ledger, Step
from tests.quantize.tiny_decoders import VOCABULARY, write

BACKEND = Backend(n_threads=1, n_gpu_layers=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A decoder whose heads are 32 wide."""
    return write(tmp_path_factory.mktemp("kv") / "model.gguf", "qwen3")


@pytest.fixture(scope="module")
def texts() -> list[Passage]:
    random = np.random.default_rng(0)
    return [
        Passage(tuple(random.integers(3, VOCABULARY, 48).tolist()), tuple(range(8, 48))) for _ in range(4)
    ]


class Counted:
    """Steps with a memory, and which of them ran."""

    def __init__(self, folder: Path) -> None:
        self.ledger, self.ran = Ledger(folder), []

    def __call__(self, step: Step):
        if self.ledger.facts(step) is None:
            self.ran.append(step.name)
        return self.ledger.ensure(step)


def cache_of(model: Path, texts: list[Passage], folder: Path) -> Cache:
    reference = folder / "reference.f32"

    def make():
        write_reference(model, texts, reference, backend=BACKEND)
        return {}

    text = Text("chats", "chats", lambda: texts, Step("reference", make, {}, (), (reference,)))
    return Cache(model, Step("file", dict, {}), (text,), folder, BACKEND, lambda *_: None)


@pytest.fixture(scope="module")
def measured(model, texts, tmp_path_factory) -> tuple[CacheReport, Cache, Counted]:
    folder = tmp_path_factory.mktemp("measured")
    cache, ensure = cache_of(model, texts, folder), Counted(folder / "steps")
    return measure_cache(cache, ensure), cache, ensure


def test_every_type_is_one_that_the_engine_and_lq_serve_have():
    served = set(serve.CellType.__args__)
    for kind in (*TYPES, *EXACT):
        assert kind in KV_TYPES
        assert kind in served
        EngineConfig(Path("model.gguf"), kv_type_k=kind, kv_type_v=kind).validate()


def test_pairs_that_another_beats_by_bytes_and_by_the_sum_are_not_measured():
    costs: dict[KVType, float] = {
        "q8_0": 0.001,
        "q5_1": 0.004,
        "q5_0": 0.002,
        "q4_1": 0.2,
        "q4_0": 0.1,
        "iq4_nl": 0.05,
    }
    found: dict[Pair, float] = {(kind, "f16"): cost for kind, cost in costs.items()}
    found |= {("f16", kind): cost / 10 for kind, cost in costs.items()}
    sizes = {"q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}
    pairs = promising(found, lambda pair: sizes[pair[0]] + sizes[pair[1]])
    assert ("q5_0", "iq4_nl") in pairs  # values cost little, so they go first
    assert ("iq4_nl", "q5_0") not in pairs
    assert not [pair for pair in pairs if "q4_1" in pair]
    assert set(ON_GPU) <= set(pairs)
    assert [sizes[k] + sizes[v] for k, v in pairs] == sorted(
        (sizes[k] + sizes[v] for k, v in pairs), reverse=True
    )


def test_the_smallest_pair_within_the_limit_is_recommended_its_error_included():
    rows = [
        Measured(("q8_0", "q8_0"), 100, 0.001, 0.0001),
        Measured(("q8_0", "q4_0"), 80, 0.0019, 0.0002),
        Measured(("q5_1", "q5_0"), 80, 0.0015, None),
        Measured(("q4_0", "q4_0"), 50, 0.01, 0.001),
    ]
    assert recommend(rows, 0.0020) == ("q5_1", "q5_0")
    assert recommend(rows, 0.0014) == ("q8_0", "q8_0")
    assert recommend(rows, 0.02, ON_GPU) == ("q4_0", "q4_0")
    assert recommend(rows, 0.0005) is None


def test_one_reading_of_the_texts_gives_the_divergence_from_each_reference(model, texts, tmp_path):
    other = write(tmp_path / "other.gguf", "qwen3", seed=2)
    paths = [tmp_path / "a.f32", tmp_path / "b.f32"]
    for source, path in zip((model, other), paths, strict=True):
        write_reference(source, texts, path, backend=BACKEND)
    both = [summarise(scores) for scores in scores_against(model, texts[:2], paths, backend=BACKEND)]
    assert both[0].kl.mean == pytest.approx(0, abs=1e-6)
    assert both[1].kl.mean > 0.01
    assert both[1] == measure(model, texts[:2], paths[1], backend=BACKEND)
    stored = summarise(scores_between(paths[1], paths[0], texts))
    assert stored.kl.mean == pytest.approx(measure(model, texts, paths[1], backend=BACKEND).kl.mean, rel=1e-4)


def test_some_passages_are_the_first_ones(texts):
    assert some(texts, 41) == texts[:2]
    assert some(texts, 40) == texts[:1]
    assert some(texts, 10_000) == texts


def test_smaller_types_diverge_more_and_f16_not_at_all(measured):
    report, _, _ = measured
    rows = {(pair.type_k, pair.type_v): pair for pair in report.pairs}
    assert set(alone()) < set(rows)
    assert rows[EXACT].from_f16 == {}
    assert rows[EXACT].from_source["chats"].kl.mean == pytest.approx(0, abs=1e-6)
    fine, coarse = (rows[kind, kind].from_f16["chats"].kl.mean for kind in ("q8_0", "q4_0"))
    assert 0 < 10 * fine < coarse
    assert rows["q4_0", "f16"].from_f16["chats"].kl.mean < coarse


def test_the_floor_is_what_other_rounding_of_sums_does(measured):
    report, _, _ = measured
    rows = {(pair.type_k, pair.type_v): pair for pair in report.pairs}
    assert abs(report.floor["chats"].kl.mean) < rows["q8_0", "q8_0"].from_f16["chats"].kl.mean
    assert "| floor | f16 | - | - |" in "\n".join(sections(report))


def test_what_a_pair_adds_to_the_divergence_from_the_source_decides(measured):
    report, _, _ = measured
    for pair in report.pairs:
        before, after = report.exact.from_source["chats"].kl.mean, pair.from_source["chats"].kl.mean
        assert pair.added["chats"].mean == pytest.approx(after - before, abs=1e-6)
    assert report.limit == SHARE * report.exact.from_source["chats"].kl.mean


def test_bytes_are_those_that_lq_serve_reckons_with(measured, model):
    report, _, _ = measured
    for pair in report.pairs:
        expected = kv_bytes_per_cell(read_header(model), type_k=pair.type_k, type_v=pair.type_v)
        assert pair.bytes_per_token == expected
    assert report.exact.bytes_per_token == 3 * 2 * 2 * (32 + 32)  # layers, heads, bytes, keys and values


def test_a_second_run_measures_nothing_again(measured):
    report, cache, first = measured
    again = Counted(first.ledger.folder)
    assert measure_cache(cache, again) == report
    assert again.ran == []


def test_a_stopped_run_goes_on_with_the_pair_where_it_stopped(model, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(kv_steps, "alone", lambda: [("q8_0", "f16"), ("f16", "q8_0")])
    cache, ensure = cache_of(model, texts, tmp_path), Counted(tmp_path / "steps")

    def stop(step: Step):
        if step.name == "kv-f16-q8_0-chats":
            raise KeyboardInterrupt
        return ensure(step)

    with pytest.raises(KeyboardInterrupt):
        measure_cache(cache, stop)
    assert "kv-q8_0-f16-chats" in ensure.ran
    ensure.ran.clear()
    measure_cache(cache, ensure)
    assert "kv-q8_0-f16-chats" not in ensure.ran
    assert "kv-f16-q8_0-chats" in ensure.ran


def test_heads_that_blocks_do_not_fill_are_refused(tmp_path):
    narrow = write(tmp_path / "narrow.gguf", "llama")
    with pytest.raises(
        CannotQuantizeCache, match=r"--kv-cache: the heads of narrow.gguf .* leave the option out"
    ):
        refuse_narrow_heads(narrow)
    refuse_narrow_heads(write(tmp_path / "wide.gguf", "qwen3"))


def test_a_run_refuses_them_before_any_text_is_written(asked, tmp_path, made):
    with pytest.raises(CannotQuantizeCache, match="--kv-cache"):
        run(dataclasses.replace(asked, out=tmp_path, kv_cache=True))
    assert "calibration" not in made


def test_the_section_names_options_of_lq_serve_and_every_pair(measured):
    report, _, _ = measured
    report = dataclasses.replace(report, recommended=("q8_0", "q8_0"), tokens_written={"f16 / f16": 100.0})
    text = "\n".join(sections(report))
    assert "lq serve model.gguf --kv-type-k q8_0 --kv-type-v q8_0" in text
    parameters = serve.serve.__annotations__
    assert {"kv_type_k", "kv_type_v"} <= set(parameters)
    for pair in report.pairs:
        assert f"| {pair.type_k} | {pair.type_v} | {pair.bytes_per_token} |" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert len(set(tables)) == 1


def test_where_every_smaller_pair_costs_too_much_f16_is_recommended(measured):
    report = dataclasses.replace(measured[0], recommended=None)
    assert "--kv-type-k f16 --kv-type-v f16" in advice(report)


def test_the_plot_has_a_line_for_every_pair(measured):
    report, _, _ = measured
    figure = cache_figure(report)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for pair in report.pairs:
        assert pair.is_exact or any(label.startswith(f"{pair.label}  ") for label in labels)
    assert png(figure).startswith(b"\x89PNG")
