"""What of a model is in the GPU's memory: llama.cpp's own rule by hand."""

from pathlib import Path

import pytest

from models.footprint import DEVICE_BYTES, can_quantize, compute_bytes, footprint
from models.gguf import Header, TensorInfo
from models.placement import Bytes, n_layers, weights
from models.tensor_types import TensorType

BLOCKS = [100, 200, 300, 400]


def header(*, head: int | None = None, **keys) -> Header:
    """4 layers of 100 to 400 bytes, a table of 50, a norm of 7 and a head of its own, if it has one."""
    given = {"block_count": 4, "embedding_length": 128, "attention.head_count": 4, "feed_forward_length": 256}
    metadata = {f"toy.{name}": value for name, value in (given | keys).items()}
    metadata |= {"general.architecture": "toy", "tokenizer.ggml.tokens": ["a"] * 10}
    sizes = {"token_embd.weight": 50, "output_norm.weight": 7}
    sizes |= {f"blk.{number}.ffn_up.weight": size for number, size in enumerate(BLOCKS)}
    sizes |= {"output.weight": head} if head else {}
    tensors = tuple(TensorInfo(name, (size,), TensorType.I8, 0, size) for name, size in sizes.items())
    return Header(Path("m.gguf"), 3, 32, metadata, tensors, 0, 2000)


@pytest.mark.parametrize(
    ("gpu_layers", "device"),
    [(0, 0), (1, 7 + 60), (2, 7 + 60 + 400), (4, 7 + 60 + 900), (5, 7 + 60 + 1000)],
)
def test_layers_go_to_the_gpu_from_the_last_one_back_and_the_head_goes_first(gpu_layers, device):
    assert weights([header(head=60)], gpu_layers) == Bytes(1117 - device, device)


def test_a_head_that_is_the_input_table_is_copied_and_the_table_stays():
    assert weights([header()], 0) == Bytes(1057)
    assert weights([header()], 1) == Bytes(1050, 7 + 50)
    assert weights([header()], 5) == Bytes(50, 1007 + 50)
    reader = header(**{"attention.causal": False})
    assert weights([reader], 5) == Bytes(50, 1007)  # it writes nothing, and has no head


def test_keys_and_values_lie_where_their_layer_does():
    def taken(gpu_layers: int) -> int:
        few, many = (
            footprint([header()], n_cells=n_cells, n_parallel=1, gpu_layers=gpu_layers)
            for n_cells in (0, 1000)
        )
        assert many.kv_bytes == 1000 * 4 * 128 * 4
        return many.device_bytes - few.device_bytes - 4 * 512 * 1000 * (gpu_layers > 0)  # less the mask

    assert [taken(count) for count in (0, 1, 2, 5)] == [0, 0, 1000 * 128 * 4, 4 * 1000 * 128 * 4]


def test_a_gpu_takes_memory_for_itself_and_for_what_it_borrows_while_layers_are_elsewhere():
    def of(gpu_layers: int):
        return footprint([header()], n_cells=256, n_parallel=2, gpu_layers=gpu_layers)

    host = compute_bytes(header(), n_cells=256, n_parallel=2)
    assert (of(0).compute_bytes, of(0).device_bytes) == (host, 0)
    assert of(5).compute_bytes - host > DEVICE_BYTES
    assert of(4).compute_bytes - of(5).compute_bytes == 2 * 400
    assert of(99) == of(5)
    for count in range(6):
        place = of(count).place
        assert place.host + place.device == of(count).total_bytes
        assert place.host >= host


def test_amounts_fit_where_both_memories_have_room():
    assert Bytes(1, 2).within(Bytes(1, 2))
    assert not Bytes(2, 0).within(Bytes(1, 9))
    assert not Bytes(0, 2).within(Bytes(9, 1))
    assert Bytes(5, 7) - Bytes(1, 2) + Bytes(1) == Bytes(5, 5)


def test_the_layers_of_a_file_that_does_not_count_them_are_its_head():
    assert n_layers(header()) == 5
    for wrong in (None, "4", -3, 1.5):
        assert n_layers(header(block_count=wrong)) == 1


def test_only_heads_of_whole_blocks_can_be_quantized():
    assert can_quantize(header())
    assert not can_quantize(header(**{"attention.head_count": 8}))  # heads of 16
    assert not can_quantize(header(**{"attention.value_length": 80}))
