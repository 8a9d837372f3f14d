"""Type names, and llama.cpp's quantize call in its child process."""

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from models.gguf import read_header
from quantize.convert import convert
from quantize.disk import DiskFull
from quantize.errors import QuantizeError
from quantize.gguf_files.child import QuantizeCallFailed, quantize
from quantize.gguf_files.tensor_types import FOR_WEIGHTS, NEED_IMPORTANCE, row_bytes, tensor_type
from quantize.gguf_files.typemap import fallback_warning, read_types
from quantize.gguf_files.types import (
    DEFAULT_TYPES,
    FTYPES,
    NEED_IMATRIX,
    NeedsImportance,
    Order,
    UnknownType,
    dequantize_rows,
    parse_types,
    quantize_rows,
    refuse_without_importance,
)
from tests.quantize.conftest import files_up_to

IQ2_XXS = 16  # ggml's number
SLOW_TO_START = {"IQ1_S", "IQ1_M", "IQ2_S"}  # their tables take seconds to build


@pytest.fixture(scope="module")
def wide_gguf(make_tiny, tmp_path_factory) -> Path:
    """A model whose rows are a whole block of 256."""
    tiny = make_tiny(
        "LlamaConfig", "llama2", hidden_size=256, intermediate_size=512, num_hidden_layers=2, eos_token_id=2
    )
    out = tmp_path_factory.mktemp("wide") / "wide.gguf"
    convert(tiny.path, out, dtype="BF16")
    return out


@pytest.fixture(scope="module")
def narrow_gguf(tiny_llama, tmp_path_factory) -> Path:
    """A model 64 wide, where K-quants do not fit."""
    out = tmp_path_factory.mktemp("narrow") / "narrow.gguf"
    convert(tiny_llama.path, out, dtype="BF16")
    return out


def test_names_are_read_in_order_once_each_with_aliases():
    assert parse_types(" q4_k, Q8_0,,iq2_xxs,Q4_K_M ") == ("Q4_K_M", "Q8_0", "IQ2_XXS")
    assert parse_types(",".join(DEFAULT_TYPES)) == DEFAULT_TYPES


def test_unknown_name_is_refused_with_the_close_one_and_the_list():
    with pytest.raises(UnknownType, match=r"'Q4_KM' is not .* did you mean Q4_K_M.*Known: F32, F16"):
        parse_types("Q8_0,Q4_KM")


def test_empty_list_is_refused():
    with pytest.raises(QuantizeError, match="the list is empty"):
        parse_types(" , ")


def test_types_that_need_importance_are_refused_by_name_without_it():
    with pytest.raises(NeedsImportance, match=r"IQ2_XXS, IQ1_S needs an importance matrix.*--calibration"):
        refuse_without_importance(("Q8_0", "IQ2_XXS", "IQ1_S"))
    refuse_without_importance(DEFAULT_TYPES)


def test_the_table_of_needy_types_is_llama_cpps_own(wide_gguf, tmp_path):
    script = f"""
from pathlib import Path
from quantize.gguf_files.types import FTYPES, Order, call
for name in FTYPES:
    said = []
    order = Order(Path({str(wide_gguf)!r}), Path({str(tmp_path / "none")!r}), name, dry_run=True)
    assert call(order, {{}}, lambda level, text: said.append(text)), name
    if b"will require an imatrix" in b"".join(said):
        print(name)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) == NEED_IMATRIX
    assert not list(tmp_path.iterdir())
    assert len(FTYPES) == 35


def test_file_holds_the_type_and_progress_names_every_tensor(wide_gguf, tmp_path):
    out, seen = tmp_path / "model.gguf", []
    fallbacks = quantize(
        Order(wide_gguf, out, "Q4_K_M", n_threads=1), progress=lambda *step: seen.append(step)
    )
    header = read_header(out)
    assert {t.type.name for t in header.tensors} == {"Q4_K", "Q6_K", "F32"}
    assert fallbacks == ()
    assert [number for number, _, _ in seen] == list(range(1, len(header.tensors) + 1))
    assert {name for _, _, name in seen} == {tensor.name for tensor in header.tensors}
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_rows_that_do_not_fit_fall_back_and_are_told(narrow_gguf, tmp_path):
    out = tmp_path / "model.gguf"
    fallbacks = quantize(Order(narrow_gguf, out, "Q4_K_M", n_threads=1))
    types = read_types(out)
    assert {share.type for share in types.shares} >= {"Q5_0", "Q8_0"}
    assert types.bits_per_weight == pytest.approx(
        8 * sum(s.size_bytes for s in types.shares) / types.n_parameters
    )
    warning = fallback_warning("Q4_K_M", fallbacks, types)
    assert warning is not None
    assert "rows of 64, 96 values" in warning
    assert "Q4_K -> Q5_0" in warning
    assert f"{types.bits_per_weight:.2f} bits per weight" in warning


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_a_weight_beyond_float16_is_told_with_the_types_that_hold_it(kind, tmp_path):
    source = tmp_path / "large.gguf"
    writer = gguf.GGUFWriter(source, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, 8),
        (writer.add_head_count, 1),
    ):
        add(value)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_layer_norm_rms_eps(1e-5)
    for name in ("token_embd.weight", "output.weight", "blk.0.attn_v.weight", "blk.0.ffn_down.weight"):
        writer.add_tensor(name, np.full((32, 32), 1e8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(QuantizeCallFailed, match=rf"float16 numbers of {kind}, .*BF16 and F32 hold"):
        quantize(Order(source, tmp_path / "out.gguf", kind, n_threads=1))
    quantize(Order(source, tmp_path / "out.gguf", "BF16", n_threads=1))


def test_an_abort_inside_llama_cpp_is_an_error_here(wide_gguf, tmp_path):
    order = Order(wide_gguf, tmp_path / "x.gguf", "Q8_0", n_threads=1, token_embedding_type=IQ2_XXS)
    with pytest.raises(QuantizeCallFailed, match=r"llama.cpp died .*GGML_ASSERT"):
        quantize(order)
    assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_model_fails_with_llama_cpps_reason(tmp_path):
    source = tmp_path / "junk.gguf"
    source.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(QuantizeCallFailed, match=r"quantizing .*junk.gguf to Q8_0 failed"):
        quantize(Order(source, tmp_path / "x.gguf", "Q8_0"))
    assert [path.name for path in tmp_path.iterdir()] == ["junk.gguf"]


def test_interrupt_stops_the_child_and_removes_the_partial_file(wide_gguf, tmp_path):
    import multiprocessing

    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(Order(wide_gguf, tmp_path / "x.gguf", "Q4_K_M"), progress=interrupt)
    assert not list(tmp_path.iterdir())
    assert not multiprocessing.active_children()


def test_full_disk_is_said_with_the_remedy_and_leaves_the_old_file(wide_gguf, tmp_path):
    out = tmp_path / "model.gguf"
    out.write_bytes(b"what was there")
    with files_up_to(1 << 20), pytest.raises(DiskFull, match=r"could not write .*MB free.*--out"):
        quantize(Order(wide_gguf, out, "Q8_0", n_threads=1))
    assert out.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_the_source_itself_is_not_overwritten(wide_gguf):
    with pytest.raises(QuantizeError, match="is the source itself"):
        quantize(Order(wide_gguf, wide_gguf, "Q8_0"))


def some_rows(rows: int = 6, n: int = 512) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, n)).astype(np.float32)


def test_tensor_types_know_their_block_and_bits():
    assert (tensor_type("Q4_0").block_elements, tensor_type("Q4_0").block_bytes) == (32, 18)
    assert tensor_type("Q6_K").bits_per_weight == 6.5625
    assert row_bytes(tensor_type("IQ4_XS"), 512) == 272
    with pytest.raises(QuantizeError, match="'Q4_K_M' is not a tensor type of ggml; known: F32, F16"):
        tensor_type("Q4_K_M")


@pytest.mark.parametrize("name", sorted(set(FOR_WEIGHTS) - SLOW_TO_START))
def test_rows_of_every_type_come_back_near_what_they_were(name):
    rows = some_rows()
    data = quantize_rows(name, rows, np.ones(512, np.float32))
    back = dequantize_rows(name, data, 512)
    bits = min(tensor_type(name).bits_per_weight, 9)
    assert data.shape == (6, row_bytes(tensor_type(name), 512))
    assert np.mean((back - rows) ** 2) < (4.0**-bits * 8 if bits > 2.5 else 0.7)
    if name not in {"NVFP4", "Q1_0"}:  # gguf knows their sizes, but does not read them
        np.testing.assert_allclose(gguf.dequantize(data, gguf.GGMLQuantizationType[name]), back, rtol=1e-6)


def test_rows_do_not_depend_on_threads_or_on_each_other():
    rows = some_rows(300)
    importance = np.random.default_rng(1).random(512).astype(np.float32)
    whole = quantize_rows("Q4_K", rows, importance, n_threads=3)
    apart = [quantize_rows("Q4_K", rows[i : i + 1], importance, n_threads=1) for i in (0, 150, 299)]
    np.testing.assert_array_equal(whole[[0, 150, 299]], np.concatenate(apart))


def test_importance_shifts_the_error_to_columns_that_do_not_matter():
    rows, importance = some_rows(32), np.ones(512, np.float32)
    importance[::2] = 1000
    error = (dequantize_rows("Q3_K", quantize_rows("Q3_K", rows, importance), 512) - rows) ** 2
    plain = (dequantize_rows("Q3_K", quantize_rows("Q3_K", rows, None), 512) - rows) ** 2
    assert error[:, ::2].mean() < 0.95 * plain[:, ::2].mean()


@pytest.mark.parametrize("name", sorted(NEED_IMPORTANCE - SLOW_TO_START))
def test_types_that_need_importance_run_with_any(name):
    rows = some_rows()
    rows[0], rows[1], rows[2] = 0, 1, 1e-20
    importance = np.zeros(512, np.float32)
    assert np.isfinite(dequantize_rows(name, quantize_rows(name, rows, importance), 512)).all()
    importance[3] = 1e-30
    assert np.isfinite(dequantize_rows(name, quantize_rows(name, rows, importance), 512)).all()


@pytest.mark.parametrize("name", sorted(NEED_IMPORTANCE))
def test_types_that_would_abort_are_refused_by_name(name):
    with pytest.raises(QuantizeError, match=f"{name} cannot be made without an importance matrix"):
        quantize_rows(name, some_rows(), None)


def test_the_table_of_types_that_abort_is_ggmls_own():
    from quantize.gguf_files.types import _ggml

    asked = {name for name in FOR_WEIGHTS if _ggml().ggml_quantize_requires_imatrix(int(tensor_type(name)))}
    assert asked == NEED_IMPORTANCE


def test_rows_that_do_not_fill_blocks_are_refused():
    with pytest.raises(QuantizeError, match=r"Q4_K holds blocks of 256 .* rows of 576 .*IQ4_NL"):
        quantize_rows("Q4_K", some_rows(2, 576), None)
    with pytest.raises(QuantizeError, match="rows of 40"):
        dequantize_rows("Q8_0", np.zeros((1, 34), np.uint8), 40)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(bad):
    rows = some_rows()
    rows[3, 7] = bad
    with pytest.raises(QuantizeError, match="NaN or infinity, which Q8_0 cannot"):
        quantize_rows("Q8_0", rows, None)
    importance = np.ones(512, np.float32)
    importance[9] = bad
    with pytest.raises(QuantizeError, match="not finite"):
        quantize_rows("Q8_0", some_rows(), importance)


@pytest.mark.parametrize("importance", [-np.ones(512, np.float32), np.ones(511, np.float32)])
def test_importance_of_another_shape_or_sign_is_refused(importance):
    with pytest.raises(QuantizeError, match=r"importance (has shape \(511,\)|holds .*negative)"):
        quantize_rows("Q8_0", some_rows(), importance)


@pytest.mark.parametrize(("name", "value"), [("F16", 7e4), ("Q4_0", 6e5), ("IQ2_XXS", 1e12), ("Q6_K", 1e30)])
def test_weights_beyond_float16_scales_are_refused_where_they_do_not_fit(name, value):
    rows = some_rows()
    rows[2, 5] = value
    with pytest.raises(QuantizeError, match=rf"beyond the float16 numbers of {name}; BF16 and F32 hold it"):
        quantize_rows(name, rows, np.ones(512, np.float32))
    back = dequantize_rows("BF16", quantize_rows("BF16", rows, None), 512)
    np.testing.assert_allclose(back, rows, rtol=2**-8)


def test_data_of_another_shape_or_type_is_refused():
    with pytest.raises(QuantizeError, match=r"Q8_0 rows of 32 weights are \(rows, 34\) uint8, not \(1, 33\)"):
        dequantize_rows("Q8_0", np.zeros((1, 33), np.uint8), 32)
    with pytest.raises(QuantizeError, match="float32"):
        dequantize_rows("Q8_0", np.zeros((1, 34), np.float32), 32)
    with pytest.raises(QuantizeError, match="are not rows"):
        quantize_rows("Q8_0", np.zeros(32, np.float32), None)
