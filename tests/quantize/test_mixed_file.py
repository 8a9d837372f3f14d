"""A file of chosen types: the bytes that llama.cpp writes, resumed, exact in size, whole or not there."""

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import gguf
import numpy as np
import pytest

from models.gguf import InvalidGGUF, read_header
from models.tensor_types import TensorType
from quantize.calibration.imatrix import Entry, ImportanceMatrix
from quantize.convert import convert
from quantize.disk import DiskFull
from quantize.errors import QuantizeError
from quantize.gguf_files import mixed_file
from quantize.gguf_files import parts as parts_module
from quantize.gguf_files.child import quantize
from quantize.gguf_files.mixed_file import (
    ImportanceNote,
    MixedSource,
    NotFullPrecision,
    Parts,
    Rows,
    UnfitType,
    matrices,
    write_mixed,
)
from quantize.gguf_files.parts import BadWeights, WrongRounding
from quantize.gguf_files.tensor_rules import fitting_types, may_be_quantized
from quantize.gguf_files.types import Order
from tests import tiny_models
from tests.quantize.conftest import files_up_to

ROOT = Path(__file__).parents[2]
CYCLE = ("Q8_0", "Q4_0", "Q5_1", "Q4_1", "Q5_0", "F16")


def encode(rows: Rows) -> np.ndarray:
    """gguf's own rounding, which is ggml's without importance."""
    return gguf.quants.quantize(rows.weights, gguf.GGMLQuantizationType[rows.type])


def unchanged(_tensor: str, _type: str) -> str:
    return "one way of rounding"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def data_of(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {t.name: data[t.offset : t.offset + t.size_bytes] for t in read_header(path).tensors}


def cycled(source: MixedSource) -> dict[str, str]:
    return {tensor.name: CYCLE[i % len(CYCLE)] for i, tensor in enumerate(source.quantizable)}


class Counting:
    """Notes which tensors are rounded; stops at one if told to."""

    def __init__(self, stop_at: str | None = None) -> None:
        self.tensors: list[str] = []
        self.stop_at = stop_at

    def __call__(self, rows: Rows) -> np.ndarray:
        if rows.tensor == self.stop_at:
            raise KeyboardInterrupt
        if not self.tensors or self.tensors[-1] != rows.tensor:
            self.tensors.append(rows.tensor)
        return encode(rows)


@pytest.fixture(scope="module")
def source_path(tiny_llama, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("source") / "tiny.gguf"
    convert(tiny_llama.path, out, dtype="BF16")
    return out


@pytest.fixture(scope="module")
def source(source_path) -> MixedSource:
    return MixedSource.open(source_path)


@pytest.fixture(scope="module")
def mixed(source, tmp_path_factory) -> Path:
    """A file of five types, made in one go."""
    folder = tmp_path_factory.mktemp("mixed")
    out = folder / "mixed.gguf"
    write_mixed(source, out, cycled(source), encode, parts=Parts(folder / "parts"), made_from=unchanged)
    return out


@pytest.fixture(scope="module")
def by_llama(source, tmp_path_factory) -> Path:
    """The same types by llama.cpp's own call."""
    out = tmp_path_factory.mktemp("llama") / "llama.gguf"
    overrides = tuple((f"^{name}$", int(TensorType[kind])) for name, kind in cycled(source).items())
    quantize(Order(source.path, out, "Q8_0", n_threads=1, overrides=overrides))
    return out


def moe(path: Path, *, alignment: int | None = None) -> Path:
    """A mixture of three experts, as far as quantizing needs one."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(1)
    writer.add_context_length(8)
    writer.add_head_count(1)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(3)
    writer.add_expert_used_count(1)
    draw = np.random.default_rng(4)
    for name, shape in (
        ("token_embd.weight", (40, 64)),
        ("output_norm.weight", (64,)),
        ("blk.0.attn_v.weight", (1, 64)),
        ("blk.0.ffn_gate_inp.weight", (3, 64)),
        ("blk.0.ffn_up_exps.weight", (3, 96, 64)),
        ("blk.0.ffn_down_exps.weight", (3, 64, 96)),
        ("blk.0.ffn_down_exps.bias", (3, 64)),
    ):
        writer.add_tensor(name, draw.normal(0, 0.1, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_tensor_has_the_bytes_that_llama_cpp_gives_it_for_the_same_type(mixed, by_llama):
    ours, theirs = data_of(mixed), data_of(by_llama)
    assert {t.name: t.type for t in read_header(mixed).tensors} == {
        t.name: t.type for t in read_header(by_llama).tensors
    }
    assert {t.type.name for t in read_header(mixed).tensors} == {*CYCLE, "F32"}
    assert [name for name in ours if ours[name] != theirs[name]] == []


def test_the_file_is_as_large_as_llama_cpps_and_as_was_foretold(source, mixed, by_llama):
    assert mixed.stat().st_size == source.layout(cycled(source)).size_bytes == by_llama.stat().st_size


def test_all_metadata_is_kept_and_the_file_type_is_the_predominant_ones(source, mixed, by_llama):
    ours, theirs = read_header(mixed), read_header(by_llama)
    assert dict(ours.metadata) | {"general.file_type": 0} == dict(theirs.metadata) | {"general.file_type": 0}
    counts: dict[str, int] = {}
    for tensor in ours.tensors:
        counts[tensor.type.name] = counts.get(tensor.type.name, 0) + tensor.n_elements
    assert max(counts, key=lambda name: counts[name]) == "Q4_0"  # llama2's embedding, second of the cycle
    assert ours.file_type == 2
    everything = source.layout({tensor.name: "Q5_1" for tensor in source.quantizable})
    assert b"general.file_type\x04\0\0\0\x09\0\0\0" in everything.header


def test_the_engine_reads_it_and_predicts_what_it_predicts_with_llama_cpps_own(
    mixed, by_llama, evaluate_gguf, some_tokens
):
    ours = evaluate_gguf(mixed, some_tokens)
    assert np.isfinite(ours).all()
    assert np.array_equal(ours, evaluate_gguf(by_llama, some_tokens))


def test_what_llama_quantize_notes_of_the_importance_matrix_is_noted(source, tmp_path):
    name = source.quantizable[1].name
    width = source.quantizable[1].shape[0]
    matrix = ImportanceMatrix({name: Entry(np.ones((1, width)), np.array([1.0]))}, ("calibration",), 3, 256)
    matrix.write(tmp_path / "imatrix.gguf")
    quantize(Order(source.path, tmp_path / "theirs.gguf", "Q8_0", tmp_path / "imatrix.gguf", n_threads=1))
    note = ImportanceNote("imatrix.gguf", 1)
    types = {tensor.name: "Q8_0" for tensor in source.quantizable}
    write_mixed(
        source, tmp_path / "ours.gguf", types, encode, parts=Parts(tmp_path), made_from=unchanged, note=note
    )
    ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
    assert dict(ours.metadata) == dict(theirs.metadata)
    assert ours.metadata["quantize.imatrix.entries_count"] == 1
    full = ImportanceNote("ä" * 100, 5, dataset="chats", n_chunks=7).values()
    assert full == {
        "quantize.imatrix.file": "ä" * 63,
        "quantize.imatrix.dataset": "chats",
        "quantize.imatrix.entries_count": 5,
        "quantize.imatrix.chunks_count": 7,
    }


@pytest.mark.parametrize("make", [tiny_models.bert, tiny_models.qwen3, moe])
def test_the_tensors_that_may_be_quantized_are_those_that_llama_cpp_quantizes(make, tmp_path):
    path = make(tmp_path / "model.gguf")
    quantize(Order(path, tmp_path / "q.gguf", "Q8_0", n_threads=1))
    theirs = {t.name for t in read_header(tmp_path / "q.gguf").tensors if t.type.name != "F32"}
    assert {tensor.name for tensor in MixedSource.open(path).quantizable} == theirs


def test_names_and_shapes_that_stay_as_they_are():
    assert may_be_quantized("blk.0.attn_q.weight", (64, 64))
    assert may_be_quantized("blk.0.ffn_up_exps.weight", (64, 96, 8))
    for name, shape in (
        ("blk.0.attn_norm.weight", (64,)),
        ("blk.0.attn_v.weight", (64, 1)),
        ("blk.0.attn_q_norm.weight", (64, 8)),
        ("blk.0.ffn_gate_inp.weight", (64, 8)),
        ("blk.0.ffn_down_exps.bias", (64, 8)),
        ("blk.0.ssm_conv1d.weight", (4, 64)),
        ("v.patch_embd.weight", (14, 14, 3, 64)),
        ("conv.weight", (4, 4, 3, 64)),
        ("position_embd.weight", (64, 96)),
    ):
        assert not may_be_quantized(name, shape), name
    assert may_be_quantized("blk.0.ssm_beta.weight", (64, 64), "qwen3next")
    assert not may_be_quantized("blk.0.ssm_beta.weight", (64, 64), "glm5-next")


def test_types_whose_blocks_do_not_fill_a_row_are_left_out(source):
    assert fitting_types(576, ("Q4_K", "IQ4_NL", "Q6_K", "Q8_0", "F16")) == ("IQ4_NL", "Q8_0", "F16")
    assert fitting_types(1536, ("Q4_K", "IQ4_NL")) == ("Q4_K", "IQ4_NL")
    sizes = source.choices(("Q4_K", "Q4_0", "F16"))["blk.0.ffn_down.weight"]
    assert sizes == {"Q4_0": 96 * 64 // 32 * 18, "F16": 96 * 64 * 2}
    with pytest.raises(UnfitType, match=r"rows of 64, which the blocks of none of Q4_K, Q6_K fill; allow"):
        source.choices(("Q4_K", "Q6_K"))


def test_experts_are_matrices_of_their_own_and_have_llama_cpps_bytes(tmp_path):
    source = MixedSource.open(moe(tmp_path / "moe.gguf"))
    seen = []

    def noting(rows: Rows) -> np.ndarray:
        seen.append((rows.tensor, rows.matrix, rows.first_row, rows.n_rows, rows.weights.shape))
        return encode(rows)

    types = {tensor.name: "Q4_0" for tensor in source.quantizable}
    out = tmp_path / "out.gguf"
    write_mixed(source, out, types, noting, parts=Parts(tmp_path / "parts"), made_from=unchanged)
    assert [each for each in seen if "ffn_down_exps" in each[0]] == [
        ("blk.0.ffn_down_exps.weight", expert, 0, 64, (64, 96)) for expert in range(3)
    ]
    overrides = tuple((f"^{name}$", int(TensorType.Q4_0)) for name in types)
    quantize(Order(source.path, tmp_path / "q.gguf", "Q8_0", n_threads=1, overrides=overrides))
    assert data_of(out) == data_of(tmp_path / "q.gguf")


def test_rows_come_in_blocks_or_whole_matrices_and_the_bytes_are_the_same(
    source, mixed, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts_module, "BLOCK_BYTES", 64 * 4 * 10)
    for whole, largest in ((False, 10), (True, 32_000)):
        counts = []

        def noting(rows: Rows, counts=counts) -> np.ndarray:
            counts.append(len(rows.weights))
            assert rows.first_row + len(rows.weights) <= rows.n_rows
            return encode(rows)

        out = tmp_path / f"{whole}.gguf"
        write_mixed(
            source, out, cycled(source), noting,
            parts=Parts(tmp_path / str(whole)), made_from=unchanged, whole_matrices=whole,
        )  # fmt: skip
        assert digest(out) == digest(mixed)
        assert max(counts) == largest


def test_a_stopped_run_goes_on_where_it_was(source, mixed, tmp_path):
    out, parts = tmp_path / "out.gguf", Parts(tmp_path / "parts")
    rounded = [each for each, kind in cycled(source).items() if kind != "F16"]
    first, second = Counting(stop_at=rounded[5]), Counting()
    with pytest.raises(KeyboardInterrupt):
        write_mixed(source, out, cycled(source), first, parts=parts, made_from=unchanged)
    assert not out.exists()
    assert first.tensors == rounded[:5]
    write_mixed(source, out, cycled(source), second, parts=parts, made_from=unchanged)
    assert second.tensors == rounded[5:]
    assert digest(out) == digest(mixed)


def test_a_killed_run_goes_on_too(source, mixed, tmp_path):
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
from pathlib import Path
from tests.quantize.test_mixed_file import MixedSource, Parts, cycled, encode, unchanged, write_mixed
seen = set()
def dying(rows):
    seen.add(rows.tensor)
    if len(seen) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(rows)
source = MixedSource.open(Path({str(source.path)!r}))
folder = Path({str(tmp_path)!r})
write_mixed(source, folder / "out.gguf", cycled(source), dying, parts=Parts(folder / "parts"),
            made_from=unchanged)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert not (tmp_path / "out.gguf").exists()
    assert list((tmp_path / "parts").glob(".*.partial"))
    counting = Counting()
    write_mixed(
        source, tmp_path / "out.gguf", cycled(source), counting,
        parts=Parts(tmp_path / "parts"), made_from=unchanged,
    )  # fmt: skip
    assert len(counting.tensors) == len([kind for kind in cycled(source).values() if kind != "F16"]) - 3
    assert digest(tmp_path / "out.gguf") == digest(mixed)
    assert not list((tmp_path / "parts").glob(".*"))


def test_a_changed_choice_or_way_of_rounding_redoes_only_what_it_concerns(source, tmp_path):
    parts, out = Parts(tmp_path / "parts"), tmp_path / "out.gguf"
    types = cycled(source)
    write_mixed(source, out, types, encode, parts=parts, made_from=unchanged)
    counting = Counting()
    changed = types | {"blk.1.attn_q.weight": "Q8_0" if types["blk.1.attn_q.weight"] != "Q8_0" else "Q4_0"}
    write_mixed(source, out, changed, counting, parts=parts, made_from=unchanged)
    assert counting.tensors == ["blk.1.attn_q.weight"]
    assert {t.name: t.type.name for t in read_header(out).tensors if t.name in changed} == changed
    counting = Counting()
    write_mixed(
        source, out, types, counting, parts=parts,
        made_from=lambda tensor, _: "anew" if tensor == "blk.2.ffn_up.weight" else "one way of rounding",
    )  # fmt: skip
    assert counting.tensors == ["blk.2.ffn_up.weight"]


def test_a_part_that_was_cut_short_is_made_again(source, tmp_path):
    parts, out = Parts(tmp_path / "parts"), tmp_path / "out.gguf"
    write_mixed(source, out, cycled(source), encode, parts=parts, made_from=unchanged)
    before = digest(out)
    part = max(parts.folder.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(part, part.stat().st_size - 1)
    counting = Counting()
    write_mixed(source, out, cycled(source), counting, parts=parts, made_from=unchanged)
    assert counting.tensors == ["token_embd.weight"]
    assert digest(out) == before


def test_parts_that_no_mix_needs_are_removed(source, tmp_path):
    parts, types = Parts(tmp_path / "parts"), cycled(source)
    write_mixed(source, tmp_path / "out.gguf", types, encode, parts=parts, made_from=unchanged)
    kept = matrices(source, {"blk.0.attn_q.weight": types["blk.0.attn_q.weight"]}, unchanged)
    parts.prune(kept)
    assert len(list(parts.folder.iterdir())) == 1
    parts.prune()
    assert not list(parts.folder.iterdir())


def test_progress_counts_the_weights_that_are_left_to_round(source, tmp_path):
    seen: list[tuple[str, int, int]] = []
    parts = Parts(tmp_path / "parts")
    for _ in range(2):
        write_mixed(
            source, tmp_path / "out.gguf", cycled(source), encode, parts=parts, made_from=unchanged,
            progress=lambda *step: seen.append(step),
        )  # fmt: skip
    total = sum(tensor.n_elements for tensor in source.quantizable)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1:] == (total, total)
    assert {name for name, _, _ in seen} == {tensor.name for tensor in source.quantizable}


def test_no_choice_means_a_copy_and_alignment_is_the_sources(tmp_path):
    source = MixedSource.open(moe(tmp_path / "moe.gguf", alignment=128))
    out = tmp_path / "copy.gguf"
    header = write_mixed(source, out, {}, encode, parts=Parts(tmp_path / "parts"), made_from=unchanged)
    assert data_of(out) == data_of(source.path)
    assert header.alignment == 128
    assert out.stat().st_size == source.layout({}).size_bytes
    sizes = source.choices(("Q8_0",))
    assert all(size % 128 == 0 for each in sizes.values() for size in each.values())


def test_a_model_in_several_files_becomes_one(tmp_path):
    whole = moe(tmp_path / "whole.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama", split_max_tensors=3)
    writer.add_block_count(1)
    for tensor in gguf.GGUFReader(whole).tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("model-*.gguf"))
    assert len(files) == 3
    source = MixedSource.open(files[0])
    out = tmp_path / "one.gguf"
    header = write_mixed(source, out, {}, encode, parts=Parts(tmp_path / "parts"), made_from=unchanged)
    assert data_of(out) == data_of(whole)
    assert not [key for key in header.metadata if key.startswith("split.")]
    with pytest.raises(InvalidGGUF, match=r"general.architecture is missing"):
        MixedSource.open(files[1])


def test_choices_that_cannot_be_are_refused_by_tensor_and_reason(source):
    for types, message in (
        ({"blk.9.attn_q.weight": "Q8_0"}, "blk.9.attn_q.weight cannot be Q8_0: the model has no such tensor"),
        ({"output_norm.weight": "Q8_0"}, "output_norm.weight cannot be Q8_0: llama.cpp keeps it as it is"),
        ({"blk.0.attn_q.weight": "Q4_K_M"}, "'Q4_K_M' is not a tensor type; give one such as Q4_0"),
        (
            {"blk.0.attn_q.weight": "Q4_K"},
            "rows of 64, which blocks of 256 do not fill: Q4_K is not",
        ),
    ):
        with pytest.raises(UnfitType, match=message):
            source.layout(types)


def test_a_quantized_source_is_refused(by_llama):
    with pytest.raises(NotFullPrecision, match=r"is .* already; a mix is made from F32, F16 or BF16"):
        MixedSource.open(by_llama)


def test_the_source_itself_is_not_overwritten(source, tmp_path):
    with pytest.raises(QuantizeError, match="is the source itself"):
        write_mixed(source, source.path, {}, encode, parts=Parts(tmp_path), made_from=unchanged)


def test_a_rounding_of_the_wrong_shape_is_refused_and_leaves_nothing(source, tmp_path):
    with pytest.raises(WrongRounding, match=r"tensor .* as Q8_0: the rounding gave float32 \[32000, 64\]"):
        write_mixed(
            source, tmp_path / "out.gguf", {"token_embd.weight": "Q8_0"}, lambda rows: rows.weights,
            parts=Parts(tmp_path / "parts"), made_from=unchanged,
        )  # fmt: skip
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_weights_that_no_type_holds_are_told_by_tensor(tmp_path):
    for value, kind, message in (
        (np.nan, "Q8_0", "tensor blk.0.a.weight holds numbers that are not finite"),
        (1e8, "F16", r"tensor blk.0.a.weight holds 1e\+08, beyond float16; choose BF16 or F32"),
    ):
        path = tmp_path / "bad.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tensor("blk.0.a.weight", np.full((4, 32), value, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(BadWeights, match=message):
            write_mixed(
                MixedSource.open(path), tmp_path / "out.gguf", {"blk.0.a.weight": kind}, encode,
                parts=Parts(tmp_path / "parts"), made_from=unchanged,
            )  # fmt: skip


def test_a_full_disk_is_said_before_and_during_the_work_and_the_old_file_stays(
    source, mixed, tmp_path, monkeypatch
):
    out, parts = tmp_path / "out.gguf", Parts(tmp_path / "parts")
    out.write_bytes(b"what was there")
    with files_up_to(1 << 20), pytest.raises(DiskFull, match=r"could not write .*MB free.*--out"):
        write_mixed(source, out, cycled(source), encode, parts=parts, made_from=unchanged)
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(mixed_file.shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**5))
        with pytest.raises(DiskFull, match="finished tensors beside it included"):
            write_mixed(source, out, cycled(source), encode, parts=parts, made_from=unchanged)
    assert out.read_bytes() == b"what was there"
    assert not list(tmp_path.glob(".*"))
    write_mixed(source, out, cycled(source), encode, parts=parts, made_from=unchanged)
    assert digest(out) == digest(mixed)
    shutil.rmtree(parts.folder)
