"""Memory told from the header: llama.cpp's own formula by hand, its real process, files that lie."""

import asyncio
from pathlib import Path

import psutil
import pytest

from engine.client import Engine
from engine.request import EngineConfig
from models.footprint import (
    PROCESS_BYTES,
    compute_bytes,
    footprint,
    kv_bytes_per_cell,
    n_vocab,
    pieces_of,
    state_bytes,
)
from models.gguf import Header, InvalidGGUF, TensorInfo, read_header
from models.tensor_types import TensorType


def header(path: str = "m.gguf", *, size: int = 1000, **keys) -> Header:
    """A model of 4 layers, 8 heads of 16; keys of the architecture replace or, None, remove."""
    given = {"block_count": 4, "embedding_length": 128, "attention.head_count": 8, "feed_forward_length": 256}
    given |= {name.replace("__", "."): value for name, value in keys.items()}
    metadata = {f"toy.{name}": value for name, value in given.items() if value is not None}
    metadata |= {"general.architecture": "toy", "tokenizer.ggml.tokens": ["a"] * 100}
    tensors = (TensorInfo("token_embd.weight", (size,), TensorType.I8, 0, size),)
    return Header(Path(path), 3, 32, metadata, tensors, 0, size)


def test_a_cell_holds_the_keys_and_values_of_every_layer():
    assert kv_bytes_per_cell(header()) == 4 * 8 * 16 * (2 + 2)
    assert kv_bytes_per_cell(header(attention__head_count_kv=2)) == 4 * 2 * 16 * (2 + 2)
    assert kv_bytes_per_cell(header(attention__head_count_kv=[2, 0, 2, 1])) == 5 * 16 * (2 + 2)
    longer = header(attention__head_count_kv=2, attention__key_length=64, attention__value_length=32)
    assert kv_bytes_per_cell(longer) == 4 * 2 * (64 * 2 + 32 * 2)


def test_layers_with_a_window_have_heads_of_their_own_length():
    gemma = header(attention__key_length=32, attention__value_length=32, attention__key_length_swa=64)
    assert kv_bytes_per_cell(gemma) == 4 * 8 * (64 * 2 + 32 * 2)


@pytest.mark.parametrize(
    ("kind", "bytes_of_32"), [("f32", 128), ("f16", 64), ("bf16", 64), ("q8_0", 34), ("q4_0", 18)]
)
def test_types_count_with_their_blocks(kind, bytes_of_32):
    blocks = 4 * 8 * 16 // 32
    assert kv_bytes_per_cell(header(), type_k=kind, type_v="f16") == blocks * (bytes_of_32 + 64)
    assert kv_bytes_per_cell(header(), type_k="f16", type_v=kind) == blocks * (bytes_of_32 + 64)


def test_a_model_without_attention_keeps_a_state_for_each_sequence_and_no_cells():
    mamba = header(
        attention__head_count=0,
        ssm__inner_size=256,
        ssm__state_size=16,
        ssm__conv_kernel=4,
        ssm__group_count=1,
    )
    assert kv_bytes_per_cell(mamba) == 0
    assert state_bytes(mamba) == 4 * 4 * (3 * (256 + 2 * 16) + 256 * 16)
    assert state_bytes(header()) == 0
    one = footprint([mamba], n_cells=1000, n_parallel=1).kv_bytes
    assert footprint([mamba], n_cells=1000, n_parallel=3).kv_bytes == 3 * one


def test_the_parts_add_up_and_grow_with_what_they_depend_on():
    small = footprint([header()], n_cells=1000, n_parallel=1)
    large = footprint([header()], n_cells=3000, n_parallel=8)
    assert small.weights_bytes == large.weights_bytes == 1000
    assert large.kv_bytes == 3 * small.kv_bytes == 3000 * 2048
    assert PROCESS_BYTES < small.compute_bytes < large.compute_bytes
    assert small.total_bytes == small.weights_bytes + small.kv_bytes + small.compute_bytes
    more = compute_bytes(header(), n_cells=1000, n_parallel=1, n_batch=2048)
    assert more > small.compute_bytes


def test_pieces_of_a_split_model_are_counted_together(tmp_path, monkeypatch):
    first = header(str(tmp_path / "m-00001-of-00002.gguf"), size=1000)
    first.metadata["split.count"] = 2
    with pytest.raises(InvalidGGUF, match=r"m-00002-of-00002\.gguf is missing"):
        pieces_of(first)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr("models.footprint.read_header", lambda path: header(str(path), size=500))
    pieces = pieces_of(first)
    assert [piece.path.name for piece in pieces] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert footprint(pieces, n_cells=256, n_parallel=1).weights_bytes == 1500
    assert pieces_of(header()) == [header()]


def test_a_later_piece_or_a_renamed_one_is_refused_with_the_right_name():
    for name in ("m-00002-of-00002.gguf", "renamed.gguf", "m-00001-of-00003.gguf"):
        piece = header(name)
        piece.metadata["split.count"] = 2
        with pytest.raises(InvalidGGUF, match="-00001-of-00002"):
            pieces_of(piece)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"block_count": None}, "toy.block_count is missing"),
        ({"embedding_length": None}, "toy.embedding_length is missing"),
        ({"block_count": "4"}, "toy.block_count is '4'"),
        ({"block_count": 2**31 - 1}, "toy.block_count is 2147483647"),
        ({"block_count": True}, "toy.block_count is True"),
        ({"embedding_length": -1}, "toy.embedding_length is -1"),
        ({"attention__head_count_kv": [2, 2]}, "head_count_kv is 'a list of 2'"),
        ({"attention__head_count_kv": [2, 2, 2, "x"]}, "head_count_kv is 'a list of 4'"),
        ({"attention__head_count_kv": 1.5}, "head_count_kv is 1.5"),
        ({"attention__key_length": 2**40}, "key_length is"),
    ],
)
def test_a_header_that_lies_is_an_invalid_gguf(keys, problem):
    with pytest.raises(InvalidGGUF, match=problem):
        footprint([header(**keys)], n_cells=256, n_parallel=1)


def test_a_file_without_a_vocabulary_counts_none():
    bare = header()
    del bare.metadata["tokenizer.ggml.tokens"]
    assert n_vocab(bare) == 0
    assert n_vocab(header()) == 100


def test_a_real_process_takes_what_the_header_says(smollm2_gguf):
    """The difference between two contexts is the KV cache alone; the whole stays below the estimate."""
    shapes = {"small": 1024, "large": 16384}

    async def taken() -> dict[str, int]:
        found = {}
        for name, n_ctx in shapes.items():
            config = EngineConfig(
                smollm2_gguf, n_ctx=n_ctx, n_parallel=1, n_threads=1, use_mmap=False, cache_ram_mb=0
            )
            engine = await Engine.start(config)
            try:
                found[name] = psutil.Process(engine.pid).memory_info().rss
            finally:
                await engine.close()
        return found

    real = asyncio.run(taken())
    pieces = pieces_of(read_header(smollm2_gguf))
    told = {
        name: footprint(pieces, n_cells=n_ctx, n_parallel=1, type_k="bf16") for name, n_ctx in shapes.items()
    }
    assert kv_bytes_per_cell(pieces[0], type_k="bf16") == 23_040  # 30 layers, 3 heads of 64, 2 bytes, twice
    grown = told["large"].kv_bytes - told["small"].kv_bytes
    assert abs(real["large"] - real["small"] - grown) < 0.04 * grown
    for name in shapes:
        floor = told[name].weights_bytes + told[name].kv_bytes
        assert floor < real[name] < told[name].total_bytes
