"""Second moments of every product's inputs, and the files they lie in."""

import numpy as np
import pytest
import torch

from quantize.describe import describe_gguf
from quantize.network import stream
from quantize.network.hessian import Hessians, NoHessian, input_of, packed, unpacked
from quantize.network.network import Network
from quantize.network.stream import TooFewTokens, cut, forward
from tests.quantize import tiny_decoders

WINDOWS = np.random.default_rng(5).integers(3, tiny_decoders.VOCABULARY, (6, 20))


@pytest.fixture(params=["qwen2", "phi3"])
def network(request, tmp_path) -> Network:
    return Network.open(tiny_decoders.write(tmp_path / "tiny.gguf", request.param))


def test_hessian_is_the_mean_product_of_every_tensors_inputs(network, tmp_path):
    hessians = Hessians(tmp_path / "h", "key")
    forward(network, WINDOWS, hessians=hessians)
    seen: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad():
        tap = lambda name, x, _: seen.setdefault(name, []).append(x.flatten(0, 1))  # noqa: E731
        hidden = network.forward(torch.from_numpy(WINDOWS), tap)
        network.logits_of(network.norm(hidden), tap)
    assert set(seen) == set(network.matrices) - {"token_embd.weight"} | {network.head_name}
    for name, parts in seen.items():
        rows = torch.cat(parts).double()
        np.testing.assert_allclose(hessians.read(name), rows.T @ rows / len(rows), atol=1e-4, rtol=1e-3)
        assert hessians.count(name) == WINDOWS.size
        assert hessians.read(name).dtype == np.float32


def test_products_of_one_input_share_one_hessian():
    assert input_of("blk.3.attn_v.weight") == input_of("blk.3.attn_k.weight") == "blk.3.attn_q.weight"
    assert input_of("blk.3.ffn_gate.weight") == "blk.3.ffn_up.weight"
    alone = ("blk.0.ffn_down.weight", "blk.0.attn_output.weight", "blk.0.attn_qkv.weight", "output.weight")
    assert [input_of(name) for name in alone] == list(alone)


def test_many_small_blocks_give_what_one_gives(network, tmp_path, monkeypatch):
    whole, parts = Hessians(tmp_path / "whole", ""), Hessians(tmp_path / "parts", "")
    forward(network, WINDOWS, hessians=whole)
    monkeypatch.setattr(stream, "BLOCK_TOKENS", 40)
    forward(network, WINDOWS, hessians=parts)
    name = "blk.2.ffn_down.weight"
    np.testing.assert_allclose(parts.read(name), whole.read(name), rtol=1e-3, atol=1e-5)


def test_what_was_not_collected_is_said_by_name(network, tmp_path):
    hessians = Hessians(tmp_path, "key")
    with pytest.raises(NoHessian, match=r"no Hessian for blk\.0\.ffn_up\.weight"):
        hessians.read("blk.0.ffn_up.weight")
    forward(network, WINDOWS, hessians=hessians)
    with pytest.raises(NoHessian, match=r"blk\.0\.attn_norm\.weight"):
        hessians.count("blk.0.attn_norm.weight")
    with pytest.raises(NoHessian, match=r"blk\.0\.ffn_up\.weight"):
        Hessians(tmp_path, "of another text").read("blk.0.ffn_up.weight")


def test_damaged_file_counts_as_missing(network, tmp_path):
    hessians = Hessians(tmp_path, "key")
    forward(network, WINDOWS, hessians=hessians)
    (tmp_path / "hessian-001.safetensors").write_bytes(b"half a head")
    assert [hessians.has(layer) for layer in (0, 1, 2, None)] == [True, False, True, True]


def test_interrupted_collection_makes_only_what_is_missing(network, tmp_path, monkeypatch):
    hessians = Hessians(tmp_path, "key")

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward(network, WINDOWS, hessians=hessians, progress=stop)
    assert [hessians.has(layer) for layer in (0, 1, 2, None)] == [True, True, False, False]
    written, write = [], Hessians.write
    monkeypatch.setattr(
        Hessians, "write", lambda self, layer, moments: (written.append(layer), write(self, layer, moments))
    )
    forward(network, WINDOWS, hessians=hessians)
    assert written == [2, None]


def test_windows_cover_sequences_to_their_ends_and_short_ones_are_left_out():
    windows = cut([range(10, 21), range(3), range(30, 38)], 4, limit=100)
    starts = [10, 14, 17, 30, 34]
    np.testing.assert_array_equal(windows, [list(range(start, start + 4)) for start in starts])


def test_every_window_begins_with_bos_once():
    windows = cut([[1, *range(10, 16)]], 4, limit=100, bos=1)
    np.testing.assert_array_equal(windows, [[1, 10, 11, 12], [1, 13, 14, 15]])


def test_more_text_than_wanted_is_thinned_out_evenly():
    windows = cut([range(100)], 10, limit=30)
    assert windows[:, 0].tolist() == [0, 30, 60]


def test_texts_shorter_than_a_window_are_refused():
    with pytest.raises(TooFewTokens, match="none of the calibration sequences has 8 tokens"):
        cut([range(7)], 8, limit=100)


def test_matrices_are_kept_to_a_share_of_both_columns():
    rows = np.random.default_rng(0).normal(size=(300, 64)) * np.geomspace(1e-6, 1e6, 64)
    rows[:, 5] = 0  # nothing ever came in
    rows[:, 6:8] *= 1e-14  # and hardly anything here: no product of both is a float32
    matrix = (rows.T @ rows / 300).astype(np.float32)
    found = unpacked(*packed(matrix))
    root = np.sqrt(np.diagonal(matrix))
    np.testing.assert_array_equal(np.diagonal(found), np.diagonal(matrix))
    np.testing.assert_array_equal(found, found.T)
    assert (np.abs(found - matrix) <= 2**-11 * np.outer(root, root)).all()
    assert np.isfinite(found).all()


def test_those_of_other_texts_make_a_finished_collection_count_as_unfinished(network, tmp_path):
    first, second = (Hessians(tmp_path / "h", key) for key in ("first", "second"))
    forward(network, WINDOWS, hessians=first)
    assert first.has(None)

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forward(network, WINDOWS[:1], hessians=second, progress=stop)
    assert second.has(0)
    assert not first.has(None)
    forward(network, WINDOWS[:1], hessians=second)
    assert second.has(None)
    assert not first.has(0)


def test_what_they_take_on_disk_is_told_before(network, tmp_path):
    path = network.file.header.path
    forward(network, WINDOWS, hessians=Hessians(tmp_path / "h", "key"))
    taken = sum(file.stat().st_size for file in (tmp_path / "h").glob("hessian-0*"))
    headers = 2048 * network.shape.n_layer
    assert taken - headers < describe_gguf(path).hessian_bytes <= taken
