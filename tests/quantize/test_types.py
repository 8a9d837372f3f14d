"""Type names, and llama.cpp's quantize call in its child process."""

import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from models.gguf import read_header
from quantize.child import QuantizeCallFailed, quantize
from quantize.convert import convert
from quantize.disk import DiskFull
from quantize.errors import QuantizeError
from quantize.typemap import fallback_warning, read_types
from quantize.types import (
    DEFAULT_TYPES,
    FTYPES,
    NEED_IMATRIX,
    NeedsImportance,
    Order,
    UnknownType,
    parse_types,
    refuse_without_importance,
)

IQ2_XXS = 16  # ggml's number


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


@contextmanager
def files_up_to(size_bytes: int):
    """Let no file grow beyond a size, here and in child processes: the next best thing to a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


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
from quantize.types import FTYPES, Order, call
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
    import gguf
    import numpy as np

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
