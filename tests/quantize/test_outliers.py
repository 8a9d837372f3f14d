"""What makes tensors hard to round: the figures, the reasons, the table, the map."""

from pathlib import Path

import numpy as np
import pytest

from quantize.gguf_files import parts
from quantize.gguf_files.mixed_file import MixedSource
from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.network.weights import WeightFile
from quantize.plots import png, svg
from quantize.structure.outliers import TensorFigures, figures, hardest, top_share
from quantize.structure.plots import tensor_figure
from quantize.structure.tensor_report import Medians, TensorReport, reasons, sections
from tests.quantize.tiny_decoders import write

UP = "blk.1.ffn_up.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("outliers") / "model.gguf", "llama")


def figures_of(path: Path, means=None, sensitivities=None) -> dict[str, TensorFigures]:
    found = figures(MixedSource.open(path), means or {}, sensitivities or {})
    return {one.name: one for one in found}


def test_figures_are_those_of_the_whole_tensor(model):
    inputs = np.arange(1, 65, dtype=np.float32) ** 4
    found = figures_of(model, {UP: inputs})[UP]
    weights = WeightFile.open(model).array(UP).astype(np.float64)
    centred = weights - weights.mean()
    assert found.shape == (64, 96)
    assert found.rms == pytest.approx(np.sqrt((weights**2).mean()))
    assert found.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2 - 3)
    assert found.max_over_rms == pytest.approx(np.abs(weights).max() / found.rms)
    rounded = dequantize_rows("Q4_0", quantize_rows("Q4_0", weights.astype(np.float32), None), 64)
    errors = (rounded - weights) ** 2
    assert found.rounded == "Q4_0"
    assert found.error == pytest.approx(errors.sum() / (weights**2).sum(), rel=1e-5)
    weighed = (errors @ inputs).sum() / (weights**2 @ inputs).sum()
    assert found.weighted_error == pytest.approx(weighed, rel=1e-5)
    assert found.input_share == pytest.approx(inputs[-1] / inputs.sum(), rel=1e-5)
    assert found.sensitivity is None


def test_a_tensor_in_blocks_has_the_same_figures(model, monkeypatch):
    whole = figures_of(model)
    monkeypatch.setattr(parts, "BLOCK_BYTES", 7 * 64 * 4)
    for name, one in figures_of(model).items():
        for field in ("rms", "kurtosis", "max_over_rms", "weight_share", "error"):
            assert getattr(one, field) == pytest.approx(getattr(whole[name], field), rel=1e-9), (name, field)


def test_norms_are_left_out_and_every_matrix_is_there(model):
    found = figures_of(model)
    assert "token_embd.weight" in found
    assert "output.weight" in found
    assert not [name for name in found if "norm" in name]
    assert len(found) == 3 * 7 + 2


def test_the_largest_hundredth_is_at_least_one_column():
    assert top_share(np.array([1.0, 3.0])) == 0.75
    assert top_share(np.array([*[1.0] * 199, 5.0])) == pytest.approx(6 / 204)  # two of two hundred
    assert top_share(np.zeros(4)) == 0.0


def plain(name: str, **changes) -> TensorFigures:
    values = {
        "name": name, "shape": (64, 64), "rms": 0.02, "kurtosis": 0.2, "max_over_rms": 5.0,
        "weight_share": 0.03, "input_share": 0.05, "rounded": "Q4_0", "error": 0.007, "weighted_error": 0.007,
        "sensitivity": 1e-4,
    }  # fmt: skip
    return TensorFigures(**{**values, **changes})


@pytest.fixture
def tensors() -> list[TensorFigures]:
    """Two layers and an embedding; one tensor with each kind of trouble."""
    return [
        plain("token_embd.weight", kurtosis=4.0, max_over_rms=15.0, error=0.012, sensitivity=0.02),
        plain("blk.0.attn_q.weight"),
        plain("blk.0.attn_v.weight", sensitivity=0.03),
        plain("blk.0.ffn_down.weight", input_share=0.8, weighted_error=0.02, sensitivity=0.01),
        plain("blk.1.attn_q.weight"),
        plain("blk.1.attn_v.weight"),
        plain("blk.1.ffn_down.weight", weight_share=0.3, error=0.01, sensitivity=0.005),
    ]


def test_the_hardest_come_first_by_sensitivity_and_without_it_by_error(tensors):
    names = [one.name for one in hardest(tensors, 3)]
    assert names == ["blk.0.attn_v.weight", "token_embd.weight", "blk.0.ffn_down.weight"]
    without = [plain(one.name, weighted_error=one.weighted_error, sensitivity=None) for one in tensors]
    assert hardest(without, 1)[0].name == "blk.0.ffn_down.weight"


def test_a_tensor_that_no_block_fills_is_not_ranked(tensors):
    odd = plain("blk.0.ffn_up.weight", rounded=None, error=None, weighted_error=None, sensitivity=None)
    assert odd not in hardest([*tensors, odd], 20)
    assert len(hardest([*tensors, odd], 20)) == len(tensors)


def test_reasons_name_what_is_unusual_in_this_model(tensors):
    medians = Medians.of(tensors)
    told = {one.name: " ".join(reasons(one, medians)) for one in tensors}
    assert "heavy tails" in told["token_embd.weight"]
    assert "single large weights" in told["token_embd.weight"]
    assert "few inputs outweigh the others" in told["blk.0.ffn_down.weight"]
    assert "few columns of large weights" in told["blk.1.ffn_down.weight"]
    assert "predictions hang on it" in told["blk.0.attn_v.weight"]
    assert "heavy tails" not in told["blk.0.attn_v.weight"]


def test_the_section_has_a_line_a_tensor_and_as_many_cells_as_columns(tensors):
    text = "\n".join(sections(TensorReport(tuple(tensors))))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(tensors)
    assert len({line.count("|") for line in lines}) == 1
    assert "by the nats that gradients predict" in text
    bare = [plain(one.name, sensitivity=None, input_share=None, weighted_error=None) for one in tensors]
    text = "\n".join(sections(TensorReport(tuple(bare))))
    assert "by their relative error" in text
    assert "nats as Q4_0" not in text
    assert list(sections(None)) == list(sections(TensorReport(()))) == []


def test_the_map_has_a_panel_for_what_is_known_and_a_row_for_every_kind(tensors):
    figure = tensor_figure(TensorReport(tuple(tensors)))
    assert figure is not None
    panels = [axes for axes in figure.axes if axes.get_title(loc="left")]
    assert len(panels) == 5
    rows = [label.get_text() for label in panels[0].get_yticklabels()]
    assert rows == ["attn_q", "attn_v", "ffn_down", "token_embd"]
    drawn = panels[0].images[0].get_array()
    assert drawn is not None
    values = np.asarray(drawn)
    assert values.shape == (4, 2)
    assert values[1, 0] == pytest.approx(0.03)
    assert (values[3] == 0.02).all()  # a tensor of no layer fills its row
    assert png(figure).startswith(b"\x89PNG")
    assert b"<svg" in svg(figure)


def test_a_model_without_layers_has_no_map():
    assert tensor_figure(TensorReport((plain("token_embd.weight"),))) is None
