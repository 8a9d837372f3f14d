"""The importance matrix against llama-imatrix's own numbers, and its file format."""

from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.llama import Context, Model, calls
from engine.tensor import TensorView
from quantize.calibration.imatrix import Entry, ImportanceMatrix, InvalidMatrix
from quantize.calibration.importance import EMBEDDING, Collector, collect, dense, routed, weight_names
from quantize.convert import convert

GOLDEN = Path(__file__).parent / "golden"
CHUNK = 256


@pytest.fixture(scope="module")
def collected(smollm2_checkpoint, tmp_path_factory) -> ImportanceMatrix:
    """What we collect on the text, chunks and model that golden/make_imatrix_golden.py gave llama-imatrix."""
    source = tmp_path_factory.mktemp("f32") / "smollm2-F32.gguf"
    convert(smollm2_checkpoint, source, dtype="F32")
    with Model.open(source, vocab_only=True) as model:
        tokens = model.tokenize((GOLDEN / "handbook.txt").read_text("utf-8"))
    chunks = [tokens[i : i + CHUNK] for i in range(0, len(tokens) - CHUNK + 1, CHUNK)]
    matrix = collect(source, chunks, dataset="handbook.txt", n_threads=2)
    source.unlink()  # half a gigabyte
    return matrix


def test_sums_equal_llama_imatrix_for_every_tensor(collected):
    golden = np.load(GOLDEN / "imatrix_golden.npz")
    counts = set(golden["count"].tolist())
    names = [name for name in golden.files if name != "count"]
    assert len(names) == 120
    for name in names:
        entry = collected.entries[name]
        assert set(entry.counts.tolist()) == counts
        difference = np.linalg.norm(entry.means() - golden[name]) / np.linalg.norm(golden[name])
        assert difference < 1e-3, name


def test_every_quantized_weight_has_an_entry_the_tied_embedding_included(collected, smollm2_gguf):
    tensors = gguf.GGUFReader(smollm2_gguf).tensors
    matrices = {t.name for t in tensors if len(t.shape) == 2}
    assert set(collected.entries) == matrices
    assert collected.entries[EMBEDDING].sums.shape == (1, 576)
    assert collected.entries[EMBEDDING].counts[0] == collected.entries["blk.29.ffn_down.weight"].counts[0]


def test_file_reads_back_and_has_the_layout_llama_quantize_wants(collected, tmp_path):
    path = tmp_path / "imatrix.gguf"
    collected.write(path)
    again = ImportanceMatrix.read(path)
    assert again.datasets == ("handbook.txt",)
    assert (again.n_chunks, again.chunk_size) == (collected.n_chunks, CHUNK)
    for name, entry in collected.entries.items():
        np.testing.assert_allclose(again.entries[name].means(), entry.means(), rtol=1e-6)
    reader = gguf.GGUFReader(path)
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert shapes["blk.0.ffn_down.weight.in_sum2"] == [1536, 1]
    assert shapes["blk.0.ffn_down.weight.counts"] == [1, 1]
    assert reader.get_field("general.architecture") is None


def test_file_of_another_kind_is_refused(smollm2_gguf, tmp_path):
    with pytest.raises(InvalidMatrix, match="is not an importance matrix"):
        ImportanceMatrix.read(smollm2_gguf)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"not a gguf at all, only text" * 10)
    with pytest.raises(InvalidMatrix):
        ImportanceMatrix.read(junk)


def test_expert_without_tokens_weighs_all_columns_alike():
    entry = Entry(np.array([[4.0, 8.0], [0.0, 0.0]]), np.array([2.0, 0.0]))
    assert entry.means().tolist() == [2, 4, 1, 1]


def test_each_expert_sums_only_the_tokens_routed_to_it():
    inputs = np.array([[[1.0, 2.0]], [[3.0, 4.0]]], np.float32)  # (tokens, 1, n)
    found = routed(3, inputs, np.array([[0, 2], [2, 1]], np.int32))
    assert found.sums.tolist() == [[1, 4], [9, 16], [10, 20]]
    assert found.counts.tolist() == [1, 1, 2]


def test_stacked_matrices_keep_their_own_sums():
    found = dense(2, np.array([[[1.0]], [[2.0]], [[3.0]], [[4.0]]], np.float32))
    assert found.sums.tolist() == [[10], [20]]
    assert found.counts.tolist() == [2, 2]


def test_passes_after_the_first_leave_out_the_head_and_see_shared_inputs_once(smollm2_gguf):
    """Of 7 products a layer q, o, gate and down are looked at; 30 layers and the head."""
    collector, seen = Collector(weight_names(smollm2_gguf)), []

    def see(view: TensorView) -> bool:
        seen.append(view.tensor.name)
        return collector.see(view)

    with (
        Model.open(smollm2_gguf) as model,
        Context.open(
            model, n_ctx=64, n_batch=16, n_threads=1, wants_tensor=collector.wants, on_tensor=see
        ) as context,
    ):
        for _ in calls(context, list(range(5, 53)), np.arange(48)):
            collector.next_batch()
    assert [seen.count("result_output"), seen.count("result_norm"), len(seen)] == [1, 2, 3 * (4 * 30 + 1)]
    assert {int(counts[0]) for counts in collector.counts.values()} == {48}
    assert set(collector.sums) == weight_names(smollm2_gguf)
    assert np.array_equal(collector.sums["blk.3.attn_q.weight"], collector.sums["blk.3.attn_v.weight"])


def test_untied_lookup_weighs_columns_by_the_tokens_that_occur(tmp_path):
    from collections import Counter

    from quantize.calibration.importance import embedding_entry

    path = tmp_path / "table.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor(EMBEDDING, np.array([[1, 2], [3, 4], [5, 6]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    entry = embedding_entry(path, Counter({0: 3, 2: 1}))
    assert entry.means().tolist() == [(3 * 1 + 25) / 4, (3 * 4 + 36) / 4]
