"""llama.cpp's quantization types by name, and its quantize calls, which may abort the process they run in.

The only file that touches llama.cpp's quantize calls. `call` makes a whole file, in a child process that
`child` owns; `quantize_rows` and `dequantize_rows` take one matrix, here, and refuse beforehand what would
abort. Refuses to know where files come from, where they go, and who is told about progress.
"""

import ctypes
import difflib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from models.tensor_types import TensorType
from quantize.errors import QuantizeError
from quantize.gguf_files.floats import LARGEST_FLOAT16
from quantize.gguf_files.tensor_types import (
    LARGEST_WEIGHT,
    NEED_IMPORTANCE,
    WITHOUT_FLOAT16,
    checked_importance,
    row_bytes,
    tensor_type,
)

#: Name -> LLAMA_FTYPE number. Every type that llama_model_quantize of the pinned llama.cpp accepts.
FTYPES: Mapping[str, int] = {
    "F32": 0, "F16": 1, "BF16": 32,
    "Q8_0": 7, "Q6_K": 18,
    "Q5_K_M": 17, "Q5_K_S": 16, "Q5_1": 9, "Q5_0": 8,
    "Q4_K_M": 15, "Q4_K_S": 14, "Q4_1": 3, "Q4_0": 2, "IQ4_NL": 25, "IQ4_XS": 30, "MXFP4_MOE": 38,
    "Q3_K_L": 13, "Q3_K_M": 12, "Q3_K_S": 11, "IQ3_M": 27, "IQ3_S": 26, "IQ3_XS": 22, "IQ3_XXS": 23,
    "Q2_K": 10, "Q2_K_S": 21, "Q2_0": 41,
    "IQ2_M": 29, "IQ2_S": 28, "IQ2_XS": 20, "IQ2_XXS": 19,
    "TQ2_0": 37, "TQ1_0": 36, "IQ1_M": 31, "IQ1_S": 24, "Q1_0": 40,
}  # fmt: skip

ALIASES: Mapping[str, str] = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M", "MXFP4": "MXFP4_MOE"}

#: Types whose recipe holds a tensor type that llama.cpp refuses, or aborts on, without an importance matrix.
NEED_IMATRIX = frozenset(
    {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}
)

ROW_BLOCK_WEIGHTS = 1 << 20  # weights that a thread rounds at a time

DEFAULT_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")


class UnknownType(QuantizeError):
    """A type name that llama.cpp does not have."""

    def __init__(self, name: str) -> None:
        close = difflib.get_close_matches(name.upper(), [*FTYPES, *ALIASES], n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        super().__init__(f"--types: {name!r} is not a quantization type{hint} Known: {', '.join(FTYPES)}")


class NeedsImportance(QuantizeError):
    """A type that is garbage without an importance matrix, asked for without one."""

    def __init__(self, names: Iterable[str]) -> None:
        listed = ", ".join(names)
        super().__init__(
            f"--types: {listed} needs an importance matrix, and --calibration none gives none; "
            "use --calibration self or a text file, or leave the type out"
        )


def parse_types(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, in order, aliases resolved, each once."""
    names: dict[str, None] = {}
    for part in (part.strip() for part in text.split(",")):
        if not part:
            continue
        name = ALIASES.get(part.upper(), part.upper())
        if name not in FTYPES:
            raise UnknownType(part)
        names[name] = None
    if not names:
        raise QuantizeError(f"--types: the list is empty; give names such as {','.join(DEFAULT_TYPES)}")
    return tuple(names)


def refuse_without_importance(types: Iterable[str]) -> None:
    """Raise before any work when a type cannot be made without an importance matrix."""
    if needing := [name for name in types if name in NEED_IMATRIX]:
        raise NeedsImportance(needing)


@dataclass(frozen=True, slots=True)
class Order:
    """One quantize call, picklable. `importance` is an imatrix GGUF; overrides are (regex, ggml type)."""

    source: Path
    out: Path
    type: str
    importance: Path | None = None
    n_threads: int = 0
    allow_requantize: bool = False
    token_embedding_type: int | None = None
    overrides: tuple[tuple[str, int], ...] = ()
    dry_run: bool = False


def call(order: Order, importance: Mapping[str, np.ndarray], log: Callable[[int, bytes], None]) -> bool:
    """Run llama_model_quantize and say whether it succeeded; `log` gets (level, text) pieces as they come.

    `importance`: tensor name -> float32 mean squares, (n_matrices * ne0,). Blocks; may abort the process.
    """
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda level, text, _: log(level, text))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[order.type]
    params.nthread = order.n_threads
    params.allow_requantize = order.allow_requantize
    params.dry_run = order.dry_run
    if order.token_embedding_type is not None:
        params.token_embedding_type = order.token_embedding_type
    alive: list[object] = [callback]  # what C holds pointers to, until the call returns
    if importance:
        params.imatrix = _first(_matrix_array(importance, alive))
        params.kv_overrides = _first(_metadata_array(order, importance, alive))
    if order.overrides:
        rows = [(pattern.encode(), kind) for pattern, kind in order.overrides]
        array = (llama_cpp.llama_model_tensor_override * (len(rows) + 1))(*rows, (None, 0))
        params.tt_overrides = _first(array)
        alive.append(array)
    code = llama_cpp.llama_model_quantize(
        str(order.source).encode(), str(order.out).encode(), ctypes.pointer(params)
    )
    alive.clear()
    return code == 0


def _first(array):
    """A pointer to a C array's first element."""
    return ctypes.cast(array, ctypes.POINTER(array._type_))


def _matrix_array(importance: Mapping[str, np.ndarray], alive: list[object]):
    """The NULL-terminated C array of importance entries."""
    import llama_cpp

    rows = []
    for name, values in importance.items():
        data = np.ascontiguousarray(values, np.float32).reshape(-1)
        alive.append(data)
        rows.append((name.encode(), data.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), data.size))
    array = (llama_cpp.llama_model_imatrix_data * (len(rows) + 1))(*rows, (None, None, 0))
    alive.append(array)
    return array


def _metadata_array(order: Order, importance: Mapping[str, np.ndarray], alive: list[object]):
    """What llama-quantize writes about the matrix that it used: file name and number of entries."""
    import llama_cpp

    array = (llama_cpp.llama_model_kv_override * 3)()
    array[0].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_STR
    array[0].key = b"quantize.imatrix.file"
    name = order.importance.name if order.importance else ""
    array[0].value.val_str = name.encode()[:127]
    array[1].tag = llama_cpp.LLAMA_KV_OVERRIDE_TYPE_INT
    array[1].key = b"quantize.imatrix.entries_count"
    array[1].value.val_i64 = len(importance)
    alive.append(array)
    return array


def quantize_rows(
    type_name: str, weights: np.ndarray, importance: np.ndarray | None, *, n_threads: int = 2
) -> np.ndarray:
    """Round (rows, n) weights as llama.cpp does; returns (rows, row_bytes) uint8.

    `importance` (n,): how much a squared error of each column counts, as in an imatrix. Some of ggml's
    searches assert that weights are positive, so a zero counts a millionth of the mean.
    """
    kind = tensor_type(type_name)
    weights = _checked_weights(kind, weights)
    if importance is None and type_name in NEED_IMPORTANCE:
        raise QuantizeError(f"{type_name} cannot be made without an importance matrix; collect one")
    weighing = None if importance is None else checked_importance(importance, weights.shape[1])
    out = np.zeros((len(weights), row_bytes(kind, weights.shape[1])), np.uint8)

    def work(rows: slice) -> None:
        source, target = weights[rows], out[rows]
        _ggml().ggml_quantize_chunk(
            int(kind), source.ctypes.data, target.ctypes.data, 0, *source.shape,
            None if weighing is None else weighing.ctypes.data,
        )  # fmt: skip

    _in_threads(work, weights, n_threads)
    _refuse_overflow(kind, weights, out)
    return out


def dequantize_rows(type_name: str, data: np.ndarray, n: int, *, n_threads: int = 2) -> np.ndarray:
    """The (rows, n) float32 values of (rows, row_bytes) uint8 data, by ggml's own code."""
    kind = tensor_type(type_name)
    wanted = row_bytes(kind, n)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != wanted:
        raise QuantizeError(
            f"{type_name} rows of {n} weights are (rows, {wanted}) uint8, not {data.shape} {data.dtype}"
        )
    data = np.ascontiguousarray(data)
    if type_name == "F32":
        return data.view(np.float32).copy()
    out = np.empty((len(data), n), np.float32)
    to_float = _ggml().ggml_get_type_traits(int(kind)).contents.to_float

    def work(rows: slice) -> None:
        to_float(data[rows].ctypes.data, out[rows].ctypes.data, out[rows].size)

    _in_threads(work, out, n_threads)
    return out


def _checked_weights(kind: TensorType, weights: np.ndarray) -> np.ndarray:
    """Contiguous float32 (rows, n), or an error that names what is wrong."""
    if weights.ndim != 2 or not len(weights):
        raise QuantizeError(f"weights of shape {weights.shape} are not rows; give (rows, n)")
    row_bytes(kind, weights.shape[1])
    weights = np.ascontiguousarray(weights, np.float32)
    if not np.isfinite(weights).all():
        raise QuantizeError(f"weights hold NaN or infinity, which {kind.name} cannot; check the checkpoint")
    if kind.name not in WITHOUT_FLOAT16 and max(weights.max(), -weights.min()) > LARGEST_WEIGHT:
        raise _beyond_float16(kind, weights)
    return weights


def _refuse_overflow(kind: TensorType, weights: np.ndarray, data: np.ndarray) -> None:
    """Raise where a float16 scale became infinite; only rows of large weights can have one."""
    if kind.name in WITHOUT_FLOAT16:
        return
    rows = np.flatnonzero(np.maximum(weights.max(1), -weights.min(1)) > LARGEST_FLOAT16 / 2)
    if rows.size and not np.isfinite(dequantize_rows(kind.name, data[rows], weights.shape[1])).all():
        raise _beyond_float16(kind, weights)


def _beyond_float16(kind: TensorType, weights: np.ndarray) -> QuantizeError:
    return QuantizeError(
        f"a weight of {np.abs(weights).max():.3g} is beyond the float16 numbers of {kind.name}; "
        "BF16 and F32 hold it"
    )


def _in_threads(work: Callable[[slice], None], rows: np.ndarray, n_threads: int) -> None:
    """Call `work` on blocks of rows, on a few threads: ctypes lets go of the interpreter meanwhile."""
    size = max(1, ROW_BLOCK_WEIGHTS // rows.shape[1])
    blocks = [slice(start, start + size) for start in range(0, len(rows), size)]
    if len(blocks) == 1 and n_threads > 1 and rows.size > ROW_BLOCK_WEIGHTS // 16:
        half = -(-len(rows) // n_threads)
        blocks = [slice(start, start + half) for start in range(0, len(rows), half)]
    with ThreadPoolExecutor(max(1, n_threads)) as pool:
        list(pool.map(work, blocks))


class _Traits(ctypes.Structure):
    """ggml_type_traits of the pinned llama.cpp."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_width", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@cache
def _ggml() -> ctypes.CDLL:
    """The library that holds ggml's rounding, with the signatures that are used here."""
    import llama_cpp
    from llama_cpp._ctypes_extensions import load_shared_library

    library = load_shared_library("ggml-base", Path(llama_cpp.__file__).parent / "lib")
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p,
        ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p,
    ]  # fmt: skip
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_get_type_traits.restype = ctypes.POINTER(_Traits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    return library
