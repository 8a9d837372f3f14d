"""Layers that are left out: what the file computes then, which layers go, and what is refused."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from models.gguf import read_header
from quantize.divergence import Estimate
from quantize.errors import QuantizeError
from quantize.network.network import Network
from quantize.network.shape import read_shape
from quantize.pipeline import run
from quantize.structure import prune_steps, pruned_file
from quantize.structure.influence import block_influences
from quantize.structure.prune_report import report_of, sections, summary
from quantize.structure.pruned_file import NOTE, CannotPrune, Pruning, layer_elements
from quantize.structure.search import InvalidLayers, Rung, parse_layers, price, search
from tests.quantize.tiny_decoders import INNER, KV_HEADS, VARIANTS, VOCABULARY, write

TOKENS = np.random.default_rng(1).integers(3, VOCABULARY, (2, 40))


def without(path: Path, dropped: Sequence[int]) -> np.ndarray:
    """(tokens, vocabulary) logits of a model whose layers are skipped, in float64."""
    network = Network.open(path, dtype=torch.float64)
    with torch.no_grad():
        hidden = network.embed(torch.from_numpy(TOKENS[:1]))
        for layer in range(network.shape.n_layer):
            hidden = hidden if layer in dropped else network.layer(layer)(hidden)
        return network.head(hidden)[0].numpy()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_computes_what_the_layers_that_stay_compute(variant, tmp_path, evaluate_gguf, max_kl):
    source = write(tmp_path / "source.gguf", variant)
    if "half of the head" in variant or "capped" in variant:
        dropped = [0]
    else:
        dropped = [1, 5] if variant == "gemma3" else [1]  # of seven layers, the sixth sees everything
    made = Pruning.of(source, dropped).write(tmp_path / "pruned.gguf")
    assert made.hyperparameter("block_count") == made.metadata[f"{made.architecture}.block_count"]
    expected = without(source, dropped)
    assert max_kl(expected, without(tmp_path / "pruned.gguf", [])) < 1e-12
    assert max_kl(expected, evaluate_gguf(tmp_path / "pruned.gguf", TOKENS[0].tolist())) < 1e-5
    shapes = read_shape(read_header(source)), read_shape(made)
    kept = [layer for layer in range(shapes[0].n_layer) if layer not in dropped]
    assert shapes[1].windows == tuple(shapes[0].windows[layer] for layer in kept)
    assert made.metadata[NOTE] == ",".join(str(layer) for layer in dropped)


def test_without_layers_to_leave_out_the_file_says_the_same(tmp_path):
    source = write(tmp_path / "source.gguf", "llama")
    made = Pruning.of(source, ()).write(tmp_path / "same.gguf")
    assert made.metadata == read_header(source).metadata
    assert NOTE not in made.metadata


def with_metadata(path: Path, values: dict[str, list]) -> Path:
    """A tiny llama with arrays in its metadata."""
    architecture, keys, options = VARIANTS["llama"]
    VARIANTS["with arrays"] = (architecture, {**keys, **values}, {**options, "n_layer": 3})
    try:
        return write(path, "with arrays")
    finally:
        del VARIANTS["with arrays"]


def test_values_of_each_layer_go_with_their_layers(tmp_path):
    source = with_metadata(
        tmp_path / "source.gguf", {"feed_forward_lengths_of_old": [1, 2], "rope.sections": [1, 2, 3, 4]}
    )
    reader = read_header(source)
    assert reader.hyperparameter("rope.sections") == [1, 2, 3, 4]
    made = Pruning.of(source, [1]).write(tmp_path / "pruned.gguf")
    assert made.hyperparameter("rope.sections") == [1, 2, 3, 4]  # not one a layer
    assert made.hyperparameter("block_count") == 2


@pytest.mark.parametrize("key", sorted(pruned_file.PER_LAYER))
def test_arrays_known_to_have_a_value_a_layer_lose_those_of_the_layers(key, tmp_path):
    values = {"attention.sliding_window_pattern": [True, False, True]}.get(key, [7, 8, 9])
    source = write(tmp_path / "source.gguf", "llama")
    metadata = pruned_file.Metadata.read(source)
    flags = metadata.with_flags("llama.x", [True, False, True]).with_items("llama.x", [2, 1])
    assert flags.pairs["llama.x"].endswith(bytes([1, 0]))
    header = read_header(source)
    changed = dataclasses.replace(header, metadata={**header.metadata, f"llama.{key}": values})
    Pruning(changed, frozenset({0}))._check_array(f"llama.{key}", values)  # three of three are right
    with pytest.raises(CannotPrune, match=rf"llama.{key} has 2 values for 3 layers"):
        Pruning(changed, frozenset({0}))._check_array(f"llama.{key}", values[:2])


def test_an_array_that_may_have_a_value_a_layer_is_refused_by_name(tmp_path):
    source = with_metadata(tmp_path / "source.gguf", {"mystery": [1, 2, 3]})
    with pytest.raises(
        CannotPrune, match=r"--prune-layers: source.gguf: llama.mystery may have a value for each"
    ):
        Pruning.of(source, [1])


def test_what_cannot_be_pruned_is_refused_with_the_reason(tmp_path):
    source = write(tmp_path / "source.gguf", "llama")
    for dropped, reason in (
        ([3], "layers 0 to 2, and 3 is none"),
        ([0, 1, 2], "all of its 3 layers would be gone"),
    ):
        with pytest.raises(CannotPrune, match=reason):
            Pruning.of(source, dropped)
    gemma = write(tmp_path / "gemma.gguf", "gemma3", n_layer=62)
    with pytest.raises(CannotPrune, match="scales gemma3's attention by whether it has 62 layers"):
        Pruning.of(gemma, [1])
    other = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(other, "falcon")
    writer.add_block_count(2)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CannotPrune, match="known of llama, qwen2, qwen3, gemma3, phi3 alone"):
        Pruning.of(other, [1])


def test_a_layer_that_adds_nothing_has_no_influence(tmp_path):
    network = Network.open(write(tmp_path / "model.gguf", "llama"))
    for part in ("attn_output", "ffn_down"):
        weight = network.weight(f"blk.1.{part}.weight")
        network.replaced[f"blk.1.{part}.weight"] = torch.zeros_like(weight)
    found = block_influences(network, TOKENS, [0, 1, 2])
    assert found[1] == pytest.approx(0, abs=1e-6)
    assert min(found[0], found[2]) > 0.01


COSTS = {0: 5.0, 1: 0.3, 2: 0.2, 3: 0.25, 4: 4.0}
TOGETHER = {frozenset({2, 3}): 3.0}  # each can take over the other's work


def cost(dropped: frozenset[int]) -> Estimate:
    return Estimate(TOGETHER.get(dropped, sum(COSTS[layer] for layer in dropped)), None)


def rank(layers: Sequence[int]) -> list[float]:
    return [COSTS[layer] for layer in layers]


def test_the_search_takes_the_cheapest_layer_and_measures_the_rest_again():
    rounds = search(5, 2, rank, cost, candidates=3)
    assert [one.taken for one in rounds] == [2, 1]  # 3 alone is cheaper than 1, after 2 it is not
    assert rounds[1].best.kl.mean == pytest.approx(0.5)
    assert {trial.layer for trial in rounds[0].trials} == {1, 2, 3}


def test_the_search_stops_where_the_next_layer_does_not_pay_and_tells_what_it_would_have_cost():
    rounds = search(5, 4, rank, cost, pays=lambda added: added < 0.25, candidates=3)
    assert [one.taken for one in rounds] == [2, None]
    assert rounds[-1].best.layer == 1


def test_the_price_of_a_byte_is_the_slope_of_the_hull_at_the_size_that_counts():
    rungs = [
        Rung("a", 100, 0.0),
        Rung("b", 80, 0.2),
        Rung("bad", 70, 5.0),
        Rung("c", 60, 1.2),
        Rung("same", 80, 0.9),
    ]
    found = price(rungs, 75)
    assert found is not None
    assert (found.larger.type, found.smaller.type) == ("b", "c")
    assert found.nats_per_byte == pytest.approx(1.0 / 20)
    assert price(rungs, 90).nats_per_byte == pytest.approx(0.2 / 20)  # pyright: ignore[reportOptionalMemberAccess]
    assert price(rungs, 10).smaller.type == "c"  # pyright: ignore[reportOptionalMemberAccess]
    assert price(rungs, 500).larger.type == "a"  # pyright: ignore[reportOptionalMemberAccess]


def test_without_a_smaller_type_that_costs_there_is_no_price():
    assert price([Rung("a", 100, 0.0)], 50) is None
    assert price([Rung("a", 100, 0.0), Rung("b", 50, 0.0)], 50) is None


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "", "²"])
def test_what_is_no_number_of_layers_is_refused(text):
    with pytest.raises(InvalidLayers, match="give a number of layers, 1 or more, or auto"):
        parse_layers(text)
    assert parse_layers("12") == 12
    assert parse_layers("auto") == "auto"


def test_a_run_that_leaves_out_a_layer_makes_smaller_files_measured_against_the_whole_source(
    asked, tmp_path, made
):
    settings = dataclasses.replace(asked, out=tmp_path, types=("Q8_0",), prune_layers=1)
    report = run(settings)
    held = read_header(tmp_path / "tiny-Q8_0.gguf")
    assert held.hyperparameter("block_count") == 2
    assert report.structure is not None
    layers = report.structure.layers
    assert layers is not None
    assert layers.n_layer == 3
    assert held.metadata[NOTE] == str(layers.dropped[0])
    assert layers.chats is not None
    file = report.files[0]
    assert file.chats is not None
    assert file.chats.kl.mean == pytest.approx(layers.chats.kl.mean, rel=0.2)  # Q8_0 adds little to it
    assert len(layers.rounds[0].trials) == 3
    card = (tmp_path / "report.md").read_text("utf-8")
    assert f"Left out of 3 layers ({100 * layers.share_a_layer:.2f} % of the parameters each)" in card
    assert not (tmp_path / "work" / "pruned.gguf").exists()
    made.clear()
    run(settings)
    assert made == []


def test_auto_compares_a_layer_with_what_smaller_types_cost(asked, tmp_path, monkeypatch):
    monkeypatch.setattr(prune_steps, "RUNGS", ("Q5_K_M", "Q4_0"))
    report = run(dataclasses.replace(asked, out=tmp_path, types=("Q4_0",), prune_layers="auto"))
    assert report.structure is not None
    layers = report.structure.layers
    assert layers is not None
    assert layers.price is not None
    last = layers.rounds[-1]
    before = layers.rounds[-2].best.kl.mean if len(layers.rounds) > 1 else 0.0
    pays = last.best.kl.mean - before < layers.price.nats_per_byte * layers.bytes_a_layer
    assert pays == (last.taken is not None)
    assert "nats a MB" in (tmp_path / "report.md").read_text("utf-8")
    assert read_header(tmp_path / "tiny-Q4_0.gguf").hyperparameter("block_count") == 3 - len(layers.dropped)


def test_too_many_layers_are_refused_before_any_text_is_written(asked, tmp_path, made):
    with pytest.raises(CannotPrune, match="all of its 3 layers would be gone"):
        run(dataclasses.replace(asked, out=tmp_path, prune_layers=3))
    with pytest.raises(QuantizeError, match="--prune-layers is 99, and the model has 3 layers; give fewer"):
        run(dataclasses.replace(asked, out=tmp_path, prune_layers=99))
    assert "calibration" not in made


def test_layers_need_a_text_to_measure_by(asked, tmp_path):
    with pytest.raises(
        QuantizeError, match="--calibration none gives no text to measure by what layers matter"
    ):
        run(dataclasses.replace(asked, out=tmp_path, prune_layers=1, calibration="none"))


def test_the_section_shows_every_trial_and_why_auto_stopped():
    rounds = search(5, 4, rank, cost, pays=lambda added: added < 0.25, candidates=3)
    found = price([Rung("Q5_K_M", 100_000_000, 0.01), Rung("Q4_K_M", 90_000_000, 0.06)], 95_000_000)
    facts = {
        "asked": "auto", "n_layer": 5, "rounds": [dataclasses.asdict(one) for one in rounds],
        "price": dataclasses.asdict(found) if found else None, "bytes_a_layer": 2e6, "share_a_layer": 0.02,
    }  # fmt: skip
    report = report_of(json.loads(json.dumps(facts)))
    assert report.dropped == (2,)
    text = "\n".join(sections(report))
    assert "Layer 1 would be the next: 0.300 nats for 2.00 MB" in text
    assert "0.150 nats a MB. Smaller types ask for 0.00500 nats a MB there (Q5_K_M -> Q4_K_M" in text
    assert text.count("\n| ") >= 6
    assert "so it stays" in summary(report)


@pytest.mark.parametrize("most", [0, 2])
def test_no_layer_is_next_where_auto_had_no_more_to_take(most):
    rounds = search(5, most, rank, cost, pays=lambda _: True, candidates=3) if most else []
    found = price([Rung("Q5_K_M", 100_000_000, 0.01), Rung("Q4_K_M", 90_000_000, 0.06)], 95_000_000)
    facts = {
        "asked": "auto", "n_layer": 5, "rounds": [dataclasses.asdict(one) for one in rounds],
        "price": dataclasses.asdict(found) if found else None, "bytes_a_layer": 2e6, "share_a_layer": 0.02,
    }  # fmt: skip
    told = summary(report_of(json.loads(json.dumps(facts))))
    assert "Half of the layers is the most" in told
    assert "would be the next" not in told


def test_layers_have_their_numbers_counted(tmp_path):
    header = read_header(write(tmp_path / "model.gguf", "llama"))
    assert layer_elements(header, [0, 1, 2]) == 3 * layer_elements(header, [1])
    assert layer_elements(header, [1]) > 3 * INNER * 64
    assert header.hyperparameter("attention.head_count_kv") == KV_HEADS
