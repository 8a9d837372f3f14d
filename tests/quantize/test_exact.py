"""Weights that were quantized before are packed as they are: in one matrix, in files, from end to end."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models.gguf import read_header
from models.store import Store
from quantize.gguf_files.mixed_file import MixedSource
from quantize.gguf_files.parts import Rows
from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.mixes.budget import parse_sizes
from quantize.network.weights import WeightFile
from quantize.pipeline import run
from quantize.rounding.exact import HOLDERS, Exact, OnLattice, find_lattices, pack_exactly, with_lattices
from quantize.source import find, named
from quantize.structure.lattice_report import LatticeReport, names_in_short, sections
from tests.quantize.tiny_decoders import write

N = 128


def ordinary(rows: int = 12) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, N)).astype(np.float32) * 0.02


def on(kind: str) -> np.ndarray:
    """Weights on a lattice."""
    return dequantize_rows(kind, quantize_rows(kind, ordinary(), None), N)


@pytest.mark.parametrize(
    ("lattice", "kind"), [(one, kind) for one, kinds in HOLDERS.items() for kind in kinds]
)
def test_every_format_that_holds_a_lattice_holds_it_to_the_bit(lattice, kind):
    weights = on(lattice)
    data = pack_exactly(weights, kind, OnLattice(lattice, "F32", True, 0.0))
    assert data is not None
    np.testing.assert_array_equal(dequantize_rows(kind, data, N), weights)


def test_a_format_that_cannot_hold_a_lattice_is_left_to_others():
    lattice = OnLattice("Q5_0", "F32", True, 0.0)
    assert pack_exactly(on("Q5_0"), "Q4_0", lattice) is None
    assert pack_exactly(ordinary(), "Q5_0", lattice) is None
    huge = on("Q5_0") * np.float32(2.0**20)  # scales that float16 still holds, minimums that it does not
    assert pack_exactly(huge, "Q5_1", lattice) is None


def test_only_tensors_on_a_lattice_are_packed_so():
    weights, marker = on("Q4_0"), np.zeros((12, 4), np.uint8)
    encode = Exact(lambda _: marker, {"on": OnLattice("Q4_0", "F32", True, 0.0)})
    rows = Rows("on", "Q4_0", 0, 0, 12, weights)
    np.testing.assert_array_equal(dequantize_rows("Q4_0", encode(rows), N), weights)
    assert encode(dataclasses.replace(rows, tensor="off")) is marker
    assert encode(dataclasses.replace(rows, type="Q3_K")) is marker


def test_rounding_errors_of_formats_that_hold_a_tensor_are_none():
    weights = on("Q4_0")

    def errors(_tensor: str, weights: np.ndarray):
        yield "Q4_0", weights * 0.1
        yield "Q3_K", weights * 0.2

    found = dict(with_lattices(errors, {"on": OnLattice("Q4_0", "F32", True, 0.0)})("on", weights))
    assert not found["Q4_0"].any()
    np.testing.assert_array_equal(found["Q3_K"], weights * 0.2)
    np.testing.assert_array_equal(dict(with_lattices(errors, {})("on", weights))["Q4_0"], weights * 0.1)


def test_a_file_of_ordinary_weights_has_no_lattice(tmp_path):
    assert find_lattices(MixedSource.open(write(tmp_path / "model.gguf", "llama"))) == {}


def to_lattice(folder: Path) -> None:
    """Round a checkpoint's matrices to Q4_0, as training for it does; one layer's stay ordinary."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, weight in weights.items():
        if weight.ndim == 2 and "layers.1." not in name:
            n = weight.shape[1]
            weights[name] = dequantize_rows("Q4_0", quantize_rows("Q4_0", weight, None), n)
    save_file(weights, path, metadata={"format": "pt"})


def settings_of(folder: Path, asked, home: Path, **changes):
    """A run on a checkpoint that keeps its converted source."""
    source = named(find(str(folder), store=Store(home)), "qat")
    return dataclasses.replace(asked, source=source, calibration_tokens=300, keep_source=True, **changes)


@pytest.fixture(scope="module")
def finished(make_tiny, asked, tmp_path_factory) -> Path:
    """A checkpoint as training for Q4_0 leaves it, its rows wide enough for K-quants, in plain types."""
    tiny = make_tiny(
        "LlamaConfig", "llama2", eos_token_id=2, hidden_size=256, intermediate_size=256, num_hidden_layers=2,
        initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip
    to_lattice(tiny.path)
    out = tmp_path_factory.mktemp("exact")
    run(settings_of(tiny.path, asked, out / "home", out=out, types=("Q8_0", "Q4_K_M"), kv_cache=True))
    return out


def same_as_the_source(out: Path, label: str) -> list[str]:
    """The tensors on a lattice, all of which a file holds to the bit."""
    source, made = WeightFile.open(out / "work" / "source.gguf"), WeightFile.open(out / f"qat-{label}.gguf")
    on_lattice = json.loads((out / "work" / "lattices.json").read_text("utf-8"))
    for name in on_lattice:
        np.testing.assert_array_equal(made.array(name), source.array(name), err_msg=f"{label} {name}")
    return sorted(on_lattice)


def test_what_lies_on_a_lattice_is_in_every_file_to_the_bit(finished):
    """Rows of q and k are in another order in the file, blocks are within rows, so lattices stay."""
    source = WeightFile.open(finished / "work" / "source.gguf")
    matrices = sorted(name for name in source if len(source.shape(name)) == 2)
    for label in ("Q8_0", "Q4_K_M"):
        found = same_as_the_source(finished, label)
        assert found == [name for name in matrices if not name.startswith("blk.1.")]


def test_a_mix_packs_them_too(make_tiny, asked, tmp_path):
    tiny = make_tiny("LlamaConfig", "llama2", eos_token_id=2)
    to_lattice(tiny.path)
    budgets = parse_sizes("3.4MB")
    report = run(settings_of(tiny.path, asked, tmp_path / "home", out=tmp_path, types=(), budgets=budgets))
    found = same_as_the_source(tmp_path, "3.4MB")
    assert "token_embd.weight" in found
    assert report.structure is not None
    assert report.structure.lattices is not None
    assert sorted(report.structure.lattices.packed["qat-3.4MB.gguf"]) == found
    assert report.structure.tensors is not None
    assert report.structure.tensors.by_sensitivity


def test_a_recipe_takes_the_lattices_own_type_only_where_its_own_would_lose(finished):
    q8, q4k = (
        {tensor.name: tensor.type.name for tensor in read_header(finished / f"qat-{label}.gguf").tensors}
        for label in ("Q8_0", "Q4_K_M")
    )
    assert q8["blk.0.ffn_up.weight"] == "Q8_0"
    assert q4k["blk.0.ffn_up.weight"] == "Q4_0"
    assert q4k["blk.1.ffn_up.weight"] == "Q4_K"


def test_the_report_names_the_tensors_and_the_files(finished):
    report = json.loads((finished / "report.json").read_text("utf-8"))["structure"]["lattices"]
    assert set(report["types"].values()) == {"Q4_0"}
    assert report["inexact"] == {}
    for file in ("qat-Q8_0.gguf", "qat-Q4_K_M.gguf"):
        assert set(report["packed"][file]) == set(report["types"])
    card = (finished / "report.md").read_text("utf-8")
    assert "## Quantized before" in card
    assert "`blk.0.attn_q.weight`" in card


def test_the_same_run_measures_the_cache_of_the_file_to_serve_and_every_tensor(finished):
    report = json.loads((finished / "report.json").read_text("utf-8"))["structure"]
    assert report["cache"]["file"] in {path.name for path in finished.glob("*.gguf")}
    assert len(report["cache"]["pairs"]) > 13
    assert {tensor["name"] for tensor in report["tensors"]["tensors"]} >= set(report["lattices"]["types"])
    card = (finished / "report.md").read_text("utf-8")
    for plot in ("kv-cache", "tensors"):
        assert f"({plot}.png)" in card
        assert (finished / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert not list((finished / "work").glob("reference-*.f32"))


def test_the_section_is_there_only_for_weights_that_were_quantized():
    assert list(sections(None)) == []
    report = LatticeReport(
        4, {"blk.0.a": "Q4_0", "blk.1.a": "Q4_0"}, {"blk.1.a": 0.02}, {"m.gguf": ["blk.0.a"]}
    )
    text = "\n".join(sections(report))
    assert "2 of 4 tensors" in text
    assert "- Q4_0: 2 (`blk.0-1.a`)" in text
    assert "change by up to 0.02 of a step (`blk.1.a`)" in text
    assert "- m.gguf: 1 (`blk.0.a`)" in text


def test_names_of_neighbouring_layers_are_told_as_ranges():
    names = ["token_embd.weight", *(f"blk.{i}.attn_q.weight" for i in (0, 1, 2, 5))]
    assert names_in_short(names) == "`token_embd.weight`, `blk.0-2.attn_q.weight`, `blk.5.attn_q.weight`"
    assert names_in_short([f"t{i}" for i in range(45)]).endswith("and 5 more")
