"""How long a weight of each type takes in a decode step on this machine: measured once a type, and kept.

A model of the same row widths and random weights is written, as large as the model or a part of a large one,
and decodes one token at a time. All layers' feed-forward matrices have the type in question; all else is the
same in every file and cancels in differences. Owns the times and their file; which types a tensor gets is
decided elsewhere.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engine.kernels import LLAMA_VERSION, library_path
from engine.llama import Context, Model, default_threads, without_kernels
from engine.request import EngineError
from models.gguf import Header, TensorInfo
from models.tensor_types import TensorType
from quantize.disk import disk_errors
from quantize.errors import QuantizeError
from quantize.gguf_files.header import Entry, Metadata, lay_out
from quantize.gguf_files.parts import STORED, Encode, Rows, as_float
from quantize.measure import Backend
from quantize.source import digest
from quantize.speed import decode, processor
from quantize.steps import write_text

#: Weights of the feed-forward matrices at most: enough to come from memory rather than from caches. A smaller
#: model has as many as it has in all: what comes from caches there does so here.
WEIGHTS = 150_000_000
WIDEST_BLOCK = 256
#: What the constant part of a step is told from, beside a file of almost no feed-forward.
REFERENCE = "Q8_0"
WARM_UP, TOKENS, LEAST_TOKENS = 4, 48, 8
MOST_S = 1.0  # a type in a round, once the file is loaded
#: All types are timed in turn so many times: what slows the machine for a while must not slow one type alone.
ROUNDS = 5
N_VOCAB, HEAD_LENGTH, TILE_ROWS = 32, 64, 32
LOOKUPS = ("token_embd.weight", "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")


class CannotTime(QuantizeError):
    """A type that no model could be made of, or run with, here."""

    def __init__(self, kind: str, reason: object) -> None:
        super().__init__(f"{kind} cannot be timed on this machine: {reason}; give --objective size")


@dataclass(frozen=True, slots=True)
class Shape:
    """The model that is timed: rows of `width` and of `inner` numbers, multiples of every type's block."""

    width: int
    inner: int
    n_layers: int

    @classmethod
    def like(cls, header: Header) -> "Shape":
        """As wide as a model, of as many weights or of WEIGHTS; its layers may be more than the model's."""
        width = _rounded(_number(header, "embedding_length") or WIDEST_BLOCK)
        inner = _number(header, "feed_forward_length") or _number(header, "expert_feed_forward_length")
        most = max(WIDEST_BLOCK, WEIGHTS // (3 * width) // WIDEST_BLOCK * WIDEST_BLOCK)
        inner = min(_rounded(inner or 4 * width), most)
        return cls(width, inner, max(1, min(WEIGHTS, header.n_parameters) // (3 * width * inner)))

    @property
    def n_weights(self) -> int:
        """In the feed-forward matrices, all of which every token reads."""
        return 3 * self.width * self.inner * self.n_layers


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Milliseconds of a one-token step that a million weights take, by type."""

    per_million: Mapping[str, float]

    def milliseconds(self, header: Header, tensor: TensorInfo, kind: str) -> float:
        """What a tensor takes of a step in a type."""
        if kind not in self.per_million:
            raise CannotTime(kind, "it was not among the types that were timed")
        return self.per_million[kind] * weights_read(header, tensor) / 1e6


def weights_read(header: Header, tensor: TensorInfo) -> float:
    """Weights that one token reads: of experts those that are chosen, of a table none, but that of a tied
    head all."""
    if tensor.name in LOOKUPS:
        writes = not header.is_encoder
        has_head = any(each.name == "output.weight" for each in header.tensors)
        return float(tensor.n_elements if tensor.name == LOOKUPS[0] and writes and not has_head else 0)
    if "_exps." in tensor.name:
        used, count = _number(header, "expert_used_count"), _number(header, "expert_count")
        return tensor.n_elements * used / count if used and count else float(tensor.n_elements)
    return float(tensor.n_elements)


def kernel_times(
    shape: Shape,
    types: Sequence[str],
    encode: Encode,
    *,
    store: Path,
    backend: Backend,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> KernelTimes:
    """The times of these types, measured unless all are in `store`; a few seconds each, nothing else running.

    `store` is a JSON file for all machines and models: times hold for a processor, its threads, a version of
    llama.cpp, our kernels as compiled, and a shape. `encode` makes random rows, as for `write_mixed`;
    `progress` is told steps done and how many there are. Raises CannotTime, DiskFull.
    """
    machine = _machine(shape, backend)
    for kind in types:
        if kind not in TensorType.__members__:
            raise CannotTime(kind, "it is no tensor type")
    times = _read(store).get(machine, {})
    if not times.keys() >= set(types):  # all anew: those of another moment do not compare with these
        times = _measure(shape, types, encode, backend, progress)
        kept = _read(store)  # others may have added theirs meanwhile
        write_text(store, json.dumps({**kept, machine: times}, indent=1, sort_keys=True))
    return KernelTimes({kind: times[kind] for kind in types})


def _measure(
    shape: Shape, types: Sequence[str], encode: Encode, backend: Backend, progress: Callable[[int, int], None]
) -> dict[str, float]:
    """What each type takes beside a step's constant part, which two files tell that differ in their width
    alone: each file's median over the rounds."""
    small = Shape(shape.width, WIDEST_BLOCK, shape.n_layers)
    kinds = list(dict.fromkeys((REFERENCE, *types)))
    files = [(small, REFERENCE), *((shape, kind) for kind in kinds)]
    taken: list[list[float]] = [[] for _ in files]
    for done in range(ROUNDS * len(files)):
        progress(done, ROUNDS * len(files))
        turn = done % len(files)
        taken[turn].append(_step_ms(*files[turn], encode, backend))
    short, *steps = map(statistics.median, taken)
    more = shape.n_weights - small.n_weights
    a_weight = max(0.0, steps[0] - short) / more if more else steps[0] / shape.n_weights
    constant = max(0.0, steps[0] - a_weight * shape.n_weights)
    per_million = [max(0.0, step - constant) / shape.n_weights * 1e6 for step in steps]
    return dict(zip(kinds, per_million, strict=True))


def _step_ms(shape: Shape, kind: str, encode: Encode, backend: Backend) -> float:
    """Median milliseconds of a one-token decode."""
    with tempfile.TemporaryDirectory(prefix="lq-times-") as folder:
        path = Path(folder) / f"{kind}.gguf"
        try:
            with disk_errors(path):
                write_model(path, shape, kind, encode)
            return _decode_ms(path, backend)
        except EngineError as error:
            raise CannotTime(kind, error) from error


def _decode_ms(path: Path, backend: Backend) -> float:
    taken: list[float] = []
    with (
        Model.open(path, n_gpu_layers=backend.n_gpu_layers) as model,
        Context.open(model, n_ctx=WARM_UP + TOKENS, n_batch=32, n_threads=backend.n_threads) as context,
    ):
        began = time.perf_counter()
        for position in range(WARM_UP + TOKENS):
            started = time.perf_counter()
            decode(context, [1], start=position)
            taken.append(time.perf_counter() - started)
            if len(taken) >= WARM_UP + LEAST_TOKENS and time.perf_counter() - began > MOST_S:
                break
    return 1e3 * statistics.median(taken[WARM_UP:])


def write_model(path: Path, shape: Shape, kind: str, encode: Encode) -> None:
    """A Llama of one small head, no vocabulary and random weights, its feed-forward in a type."""
    metadata = Metadata({}).updated(
        {
            "general.architecture": "llama",
            "llama.vocab_size": N_VOCAB,
            "llama.context_length": 4096,
            "llama.embedding_length": shape.width,
            "llama.block_count": shape.n_layers,
            "llama.feed_forward_length": shape.inner,
            "llama.attention.head_count": 1,
            "llama.attention.key_length": HEAD_LENGTH,
            "llama.attention.value_length": HEAD_LENGTH,
            "llama.rope.dimension_count": HEAD_LENGTH,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "tokenizer.ggml.model": "no_vocab",
        }
    )
    entries = list(_entries(shape, TensorType[kind]))
    layout = lay_out(metadata, entries, 32)
    tiles: dict[tuple[int, str], bytes] = {}
    with path.open("wb") as file:
        file.write(layout.header)
        for entry, offset in zip(entries, layout.offsets, strict=True):
            file.write(bytes(offset - file.tell()))
            width, n_rows = (*entry.shape, 1)[:2]
            place = width, entry.type.name
            if place not in tiles:
                tiles[place] = _random_rows(width, entry.type.name, encode)
            tile = tiles[place]
            whole, rest = divmod(n_rows, TILE_ROWS)
            file.write(tile * whole + tile[: len(tile) // TILE_ROWS * rest])
        file.write(bytes(layout.size_bytes - file.tell()))


def _entries(shape: Shape, kind: TensorType) -> Iterator[Entry]:
    plain, width, inner = TensorType.F32, shape.width, shape.inner
    yield Entry("token_embd.weight", (width, N_VOCAB), plain)
    yield Entry("output_norm.weight", (width,), plain)
    for layer in range(shape.n_layers):
        for name, size, stored in (
            ("attn_norm", (width,), plain),
            ("attn_q", (width, HEAD_LENGTH), plain),
            ("attn_k", (width, HEAD_LENGTH), plain),
            ("attn_v", (width, HEAD_LENGTH), plain),
            ("attn_output", (HEAD_LENGTH, width), plain),
            ("ffn_norm", (width,), plain),
            ("ffn_gate", (width, inner), kind),
            ("ffn_up", (width, inner), kind),
            ("ffn_down", (inner, width), kind),
        ):
            yield Entry(f"blk.{layer}.{name}.weight", size, stored)


def _random_rows(width: int, kind: str, encode: Encode) -> bytes:
    """TILE_ROWS of them. Values of a model's spread: zeros or subnormal numbers would be timed instead."""
    values = np.random.default_rng(width).normal(0, 0.02, (TILE_ROWS, width)).astype(np.float32)
    rows = Rows("weight", kind, 0, 0, TILE_ROWS, values)
    return (as_float(rows) if kind in STORED else encode(rows)).tobytes()


def _machine(shape: Shape, backend: Backend) -> str:
    """What times depend on."""
    threads = backend.n_threads or default_threads()
    layers = "all" if backend.n_gpu_layers is None else backend.n_gpu_layers
    return (
        f"{processor()}, {threads} threads, GPU layers {layers}, llama-cpp-python {LLAMA_VERSION}, "
        f"kernels {kernels()}, {shape.width} x {shape.inner} x {shape.n_layers}, {ROUNDS} rounds"
    )


def kernels() -> str:
    """Ours, as they were compiled; or that they are not in use."""
    return "off" if without_kernels() else digest(library_path())[:12]


def _read(store: Path) -> dict[str, dict[str, float]]:
    """What was kept; nothing of a file that is damaged: it is measured anew."""
    try:
        kept = json.loads(store.read_text("utf-8"))
        return {str(key): {str(k): float(v) for k, v in times.items()} for key, times in kept.items()}
    except (FileNotFoundError, ValueError, AttributeError, TypeError):
        return {}


def _number(header: Header, name: str) -> int:
    """A hyperparameter, the largest where there is one a layer; 0 without."""
    value = header.hyperparameter(name)
    values = value if isinstance(value, list) else [value]
    return max((each for each in values if isinstance(each, int)), default=0)


def _rounded(length: int) -> int:
    return max(1, round(length / WIDEST_BLOCK)) * WIDEST_BLOCK
