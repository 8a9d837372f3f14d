"""How much memory a model will take, told from its GGUF header before anything is loaded.

Weights and the KV cache to the byte, as llama.cpp allocates them; what it computes in, by an upper estimate
(docs/log.md). Pure arithmetic over headers; which memory there is, and what runs in it, is the server's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from models import placement
from models.gguf import Header, InvalidGGUF, read_header
from models.placement import Bytes
from models.tensor_types import TensorType

#: Python and llama.cpp's libraries, and what llama.cpp keeps of each token and its merge. Measured: 82 MB
#: together with a vocabulary of 49,152.
PROCESS_BYTES = 64 << 20
VOCABULARY_BYTES = 400
#: What CUDA takes of the GPU's memory for itself: context, kernels, cuBLAS and scratch. An estimate.
DEVICE_BYTES = 640 << 20
MAX_LAYERS = 1 << 14


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that an engine takes, by what they are for."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int  # at most: the process itself and what it computes in
    cache_bytes: int = 0  # at most: prefixes beside the KV cache
    device_bytes: int = 0  # of all these, what lies in the GPU's own memory

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.compute_bytes + self.cache_bytes

    @property
    def place(self) -> Bytes:
        """The same by the memory it lies in."""
        return Bytes(self.total_bytes - self.device_bytes, self.device_bytes)


def footprint(
    pieces: Sequence[Header],
    *,
    n_cells: int,
    n_parallel: int,
    type_k: str = "f16",
    type_v: str = "f16",
    n_batch: int = 512,
    gpu_layers: int = 0,
) -> Footprint:
    """What a model in these pieces (see `pieces_of`) takes; `n_cells`: tokens of context, all sequences.

    `gpu_layers`: so many of its layers are in a GPU's memory, the output head counted as one of them.
    """
    header = pieces[0]
    gpu_layers = min(gpu_layers, placement.n_layers(header))
    weights = placement.weights(pieces, gpu_layers)
    cells = _cell_bytes(header, type_k, type_v)
    kv = [n_cells * each + n_parallel * _state_bytes(header) for each in cells]
    compute = compute_bytes(header, n_cells=n_cells, n_parallel=n_parallel, n_batch=n_batch)
    device = 0
    if gpu_layers:
        device = DEVICE_BYTES + _buffers(header, n_cells, n_batch) + 4 * n_vocab(header) * n_parallel
    if 0 < gpu_layers < placement.n_layers(header):
        device += 2 * placement.largest_matrix(pieces)
    return Footprint(
        weights_bytes=weights.host + weights.device,
        kv_bytes=sum(kv),
        compute_bytes=compute + device,
        device_bytes=weights.device + placement.of_layers(kv, gpu_layers) + device,
    )


def kv_bytes_per_cell(header: Header, *, type_k: str = "f16", type_v: str = "f16") -> int:
    """Bytes that one token takes in the KV cache, over all layers.

    Layers with a sliding window count like the others: the engine keeps all of their tokens. Exact but for
    models that share or compress keys in ways of their own, which take less.
    """
    return sum(_cell_bytes(header, type_k, type_v))


def can_quantize(header: Header) -> bool:
    """Whether keys and values can be stored in blocks of 32 (q8_0, q4_0): llama.cpp cuts none in two."""
    return all(length % TensorType.Q8_0.block_elements == 0 for length in _head_lengths(header))


def state_bytes(header: Header) -> int:
    """Bytes of recurrent state (Mamba's) that one sequence takes, over all layers; 0 for a transformer."""
    return _state_bytes(header) * _n_layers(header)


def _cell_bytes(header: Header, type_k: str, type_v: str) -> list[int]:
    """Bytes of one token in each layer."""
    heads = _heads_kv(header)
    key, value = _head_lengths(header)
    return [_row_bytes(n * key, type_k) + _row_bytes(n * value, type_v) for n in heads]


def _state_bytes(header: Header) -> int:
    """Bytes of recurrent state of one sequence in one layer."""
    inner, state = _number(header, "ssm.inner_size", 0), _number(header, "ssm.state_size", 0)
    groups, kernel = _number(header, "ssm.group_count", 0), _number(header, "ssm.conv_kernel", 0)
    convolution = max(0, kernel - 1) * (inner + 2 * groups * state)
    return 4 * (convolution + inner * state)


def compute_bytes(header: Header, *, n_cells: int, n_parallel: int, n_batch: int = 512) -> int:
    """An upper estimate of everything beside weights and KV cache."""
    vocabulary = n_vocab(header) * (VOCABULARY_BYTES + 4 * n_parallel)  # and its logits
    return PROCESS_BYTES + _buffers(header, n_cells, n_batch) + vocabulary


def _buffers(header: Header, n_cells: int, n_batch: int) -> int:
    """Bytes of activations and of the mask."""
    width = _number(header, "embedding_length")
    inner = max(_per_layer(header, "feed_forward_length", 0), default=0)
    return 4 * n_batch * (4 * width + 3 * inner) + 4 * n_batch * n_cells


def n_vocab(header: Header) -> int:
    """Tokens of the vocabulary; 0 for a file without one."""
    tokens = header.metadata.get("tokenizer.ggml.tokens", ())
    return len(tokens) if isinstance(tokens, list) else 0


def pieces_of(header: Header) -> list[Header]:
    """The header and those of the model's further files: a large model may be split over several."""
    count = header.metadata.get("split.count", 0)
    if not isinstance(count, int) or count <= 1:
        return [header]
    match = re.fullmatch(r"(.*)-00001-of-(\d{5})\.gguf", header.path.name)
    if match is None or int(match[2]) != count:
        raise InvalidGGUF(
            header.path,
            f"it is one of {count} files of a split model, and not named as the first",
            remedy=f"give the file that ends in -00001-of-{count:05}.gguf",
        )
    return [header, *(_piece(header, f"{match[1]}-{n:05}-of-{match[2]}.gguf") for n in range(2, count + 1))]


def _piece(first: Header, name: str) -> Header:
    path: Path = first.path.with_name(name)
    if not path.is_file():
        raise InvalidGGUF(first.path, f"its further file {name} is missing", remedy="fetch the model again")
    return read_header(path)


def _row_bytes(n_values: int, kind: str) -> int:
    """Bytes of a row in a ggml type by its name; a part of a block takes a whole one."""
    stored = TensorType[kind.upper()]
    return -(-n_values // stored.block_elements) * stored.block_bytes


def _heads_kv(header: Header) -> list[int]:
    """Heads of keys and values, layer by layer; a layer without attention has 0."""
    return _per_layer(header, "attention.head_count_kv", None) or _per_layer(
        header, "attention.head_count", 0
    )


def _head_lengths(header: Header) -> tuple[int, int]:
    """Numbers in one key and in one value; where window layers have their own, the longer counts."""
    heads = next(iter(_per_layer(header, "attention.head_count", 0)), 0)
    length = _number(header, "embedding_length") // heads if heads else 0
    lengths = []
    for name in ("attention.key_length", "attention.value_length"):
        everywhere = _number(header, name, length)
        lengths.append(max(everywhere, _number(header, f"{name}_swa", everywhere)))
    return lengths[0], lengths[1]


def _n_layers(header: Header) -> int:
    count = _number(header, "block_count")
    if count > MAX_LAYERS:
        raise _wrong(header, "block_count", count)
    return count


def _per_layer(header: Header, name: str, default: int | None) -> list[int]:
    """A number a layer: the file gives one for all or a list; [] without either and without `default`."""
    value: Any = header.hyperparameter(name)
    n_layers = _n_layers(header)
    if value is None:
        return [] if default is None else [default] * n_layers
    if isinstance(value, list):
        if len(value) < n_layers or not all(_is_count(each) for each in value):
            raise _wrong(header, name, f"a list of {len(value)}")
        return value[:n_layers]
    return [_number(header, name)] * n_layers


def _number(header: Header, name: str, default: int | None = None) -> int:
    value = header.hyperparameter(name)
    if value is None and default is not None:
        return default
    if not _is_count(value):
        raise _wrong(header, name, value)
    return value


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _wrong(header: Header, name: str, value: Any) -> InvalidGGUF:
    key = f"{header.architecture}.{name}"
    if value is None:
        return InvalidGGUF(header.path, f"the key {key} is missing")
    return InvalidGGUF(header.path, f"{key} is {value!r}, which no model has")
