"""Good GGUF headers are described; bad ones each get one InvalidGGUF, never another exception."""

import math
import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest

from models.gguf import InvalidGGUF, read_header
from models.tensor_types import TensorType


def written(path, *, vocabulary: int = 5, alignment: int | None = None):
    """A small valid model file with every kind of value."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_context_length(2048)
    writer.add_block_count(1)
    writer.add_bool("test.flag", True)
    writer.add_float32("test.ratio", 0.5)
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_token_list([f"token{i}" for i in range(vocabulary)])
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((6, 32), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    packed = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def file(tmp_path):
    return written(tmp_path / "model.gguf")


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def crafted(path, *, keys: list[bytes] = (), tensors: list[bytes] = (), data: bytes = b"", **header):
    """A file from raw pieces; `n_keys`, `n_tensors`, `version` and `magic` may lie."""
    head = header.get("magic", b"GGUF") + struct.pack(
        "<IQQ",
        header.get("version", 3),
        header.get("n_tensors", len(tensors)),
        header.get("n_keys", len(keys)),
    )
    body = head + b"".join(keys) + b"".join(tensors)
    if tensors:
        body += b"\0" * (-len(body) % 32)
    path.write_bytes(body + data)
    return path


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dims + struct.pack("<IQ", kind, offset)


def test_a_valid_header_is_described(file):
    header = read_header(file)
    assert (header.version, header.architecture, header.n_ctx_train) == (3, "llama", 2048)
    assert header.metadata["tokenizer.ggml.tokens"] == [f"token{i}" for i in range(5)]
    assert header.metadata["test.numbers"] == [1, 2, 3]
    assert header.metadata["test.flag"] is True
    assert header.chat_template == "{{ messages }}"
    assert [t.name for t in header.tensors] == [
        "token_embd.weight", "output_norm.weight", "blk.0.ffn_up.weight",
    ]  # fmt: skip
    assert header.tensors[0].shape == (32, 6)
    assert header.n_parameters == 6 * 32 + 32 + 4 * 64
    assert header.types == {TensorType.F32: 896, TensorType.Q8_0: 272}
    assert header.bits_per_weight == pytest.approx(8 * (896 + 272) / 480)
    assert header.require("model") is header


def test_tensor_offsets_point_at_the_data(file):
    header = read_header(file)
    norm = header.tensors[1]
    raw = file.read_bytes()[norm.offset : norm.offset + norm.size_bytes]
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32), np.ones(32))
    assert norm.offset % header.alignment == 0


def test_another_alignment_is_followed(tmp_path):
    header = read_header(written(tmp_path / "a.gguf", alignment=256))
    assert header.alignment == 256
    assert all(tensor.offset % 256 == 0 for tensor in header.tensors)


def test_tensor_types_equal_those_of_the_gguf_package():
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        ours = TensorType(int(kind))
        assert (ours.name, ours.block_elements, ours.block_bytes) == (kind.name, elements, size)


def test_the_embedded_model_is_described(smollm2_gguf):
    header = read_header(smollm2_gguf)
    assert (header.architecture, header.n_ctx_train, header.n_parameters) == ("llama", 8192, 134_515_008)
    assert header.bits_per_weight == pytest.approx(5.744, abs=0.001)
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 49152


def test_a_large_vocabulary_costs_little_more_than_its_bytes(tmp_path):
    path = written(tmp_path / "large.gguf", vocabulary=150_000)
    tracemalloc.start()
    header = read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(header.metadata["tokenizer.ggml.tokens"]) == 150_000
    assert peak < 10 * path.stat().st_size


def test_a_truncated_file_says_how_many_bytes_are_needed_and_present(file):
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size - 100])
    with pytest.raises(InvalidGGUF, match=rf"need \d+ bytes, {size - 100} are present \(\d+ missing\)"):
        read_header(file)


def test_truncation_anywhere_is_an_invalid_gguf(file, tmp_path):
    data = file.read_bytes()
    last = max(t.offset + t.size_bytes for t in read_header(file).tensors)
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 200), *range(200, last, 7), last - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(InvalidGGUF):
            read_header(cut)


def test_flipped_header_bytes_parse_or_are_an_invalid_gguf(file, tmp_path):
    data = file.read_bytes()
    header_bytes = read_header(file).data_offset
    dice = random.Random(20260101)
    broken, refused = tmp_path / "broken.gguf", 0
    tracemalloc.start()
    for _ in range(1500):
        flipped = bytearray(data)
        for _ in range(dice.choice((1, 1, 2, 8))):
            flipped[dice.randrange(header_bytes)] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
        broken.write_bytes(flipped)
        try:
            read_header(broken)
        except InvalidGGUF:
            refused += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert refused > 300
    # A count that is believed asks for gigabytes; whatever else the process runs takes some of this too.
    assert peak < 2**20


LYING = {
    "tensor count is 1000000000000": {"n_tensors": 10**12},
    "tensor count is 100000, which needs": {"n_tensors": 100_000},
    "key count is 9223372036854775807": {"n_keys": 2**63 - 1},
    "key count is 60000, which needs": {"n_keys": 60_000},
    "begins with b'GGML'": {"magic": b"GGML"},
    "version 1 is not supported": {"version": 1},
    "version 4 is not supported": {"version": 4},
    r"version 50331648 \(a big-endian file\)": {"version": 0x03000000},
}


@pytest.mark.parametrize("problem", LYING)
def test_a_lying_fixed_header_is_named(tmp_path, problem):
    path = crafted(tmp_path / "x.gguf", keys=[key("a", 4, b"\0\0\0\0")], **LYING[problem])
    with pytest.raises(InvalidGGUF, match=problem):
        read_header(path)


BAD_KEYS = {
    "key 0 of 1 is empty": [key("", 4, b"\0\0\0\0")],
    "the key 'a' occurs twice": [key("a", 4, b"\0\0\0\0")] * 2,
    "key 'a' has unknown type 13": [key("a", 13, b"\0" * 8)],
    "key 'a' has unknown element type 99": [key("a", 9, struct.pack("<IQ", 99, 0) + b"\0" * 8)],
    "key 'a' is an array of arrays": [key("a", 9, struct.pack("<IQ", 9, 1) + b"\0" * 8)],
    "length of key 'a' is 9999, which needs": [key("a", 9, struct.pack("<IQ", 4, 9999))],
    "length of key 'a' is 4611686018427387904, above": [key("a", 9, struct.pack("<IQ", 10, 2**62))],
    "item 0 of 1 of key 'a'": [key("a", 9, struct.pack("<IQ", 8, 1) + struct.pack("<Q", 2**64 - 1))],
    "value of key 'a' claims 1152921504606846976 bytes": [key("a", 8, struct.pack("<Q", 2**60))],
    "neither 0 nor 1": [key("a", 7, b"\x02"), key("b", 4, b"\0\0\0\0")],
    "general.alignment is 48, not a power of two": [key("general.alignment", 4, struct.pack("<I", 48))],
    "general.alignment is 0": [key("general.alignment", 4, struct.pack("<I", 0))],
    "general.alignment is '32'": [key("general.alignment", 8, string("32"))],
}


@pytest.mark.parametrize("problem", BAD_KEYS)
def test_a_bad_key_is_named(tmp_path, problem):
    with pytest.raises(InvalidGGUF, match=problem):
        read_header(crafted(tmp_path / "x.gguf", keys=BAD_KEYS[problem]))


BAD_TENSORS = {
    "'t' has 0 dimensions": [tensor("t", (), 0, 0)],
    "'t' has 5 dimensions": [tensor("t", (1, 1, 1, 1, 1), 0, 0)],
    r"impossible shape \[0\]": [tensor("t", (0,), 0, 0)],
    "impossible shape": [tensor("t", (2**40, 2**40), 0, 0)],
    "type number 4, unknown": [tensor("t", (32,), 4, 0)],
    "rows of 33, not a multiple of Q8_0's block of 32": [tensor("t", (33,), 8, 0)],
    "the tensor 't' occurs twice": [tensor("t", (8,), 0, 0), tensor("t", (8,), 0, 32)],
    "'u' is at offset 0, expected 32": [tensor("t", (8,), 0, 0), tensor("u", (8,), 0, 0)],
    "'t' is at offset 4, expected 0": [tensor("t", (8,), 0, 4)],
    r"its tensors need 4000000064 bytes, 128 are present": [tensor("t", (1_000_000_000,), 0, 0)],
    "name of tensor 0 of 1 claims 64 bytes": [tensor("t" * 64, (8,), 0, 0)],
}


@pytest.mark.parametrize("problem", BAD_TENSORS)
def test_a_bad_tensor_is_named(tmp_path, problem):
    path = crafted(tmp_path / "x.gguf", tensors=BAD_TENSORS[problem], data=b"\0" * 64)
    with pytest.raises(InvalidGGUF, match=problem):
        read_header(path)


def test_text_that_is_not_utf8_survives(tmp_path):
    path = crafted(tmp_path / "x.gguf", keys=[key("a", 8, string(b"\xff\xfe"))])
    assert read_header(path).metadata["a"].encode("utf-8", "surrogateescape") == b"\xff\xfe"


def test_nan_values_and_empty_arrays_are_read(tmp_path):
    keys = [key("a", 6, struct.pack("<f", math.nan)), key("b", 9, struct.pack("<IQ", 8, 0))]
    metadata = read_header(crafted(tmp_path / "x.gguf", keys=keys)).metadata
    assert math.isnan(metadata["a"])
    assert metadata["b"] == []


def test_a_model_is_required_to_have_an_architecture_and_tensors(tmp_path, file):
    with pytest.raises(InvalidGGUF, match=r"general\.architecture is missing"):
        read_header(crafted(tmp_path / "x.gguf", keys=[key("a", 4, b"\0\0\0\0")])).require("model")
    with pytest.raises(InvalidGGUF, match="expected 'adapter'"):
        read_header(file).require("adapter")
