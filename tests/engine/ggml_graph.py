"""One operation through ggml's CPU backend, with or without our kernels: attention, or weights times rows.

The memory around a call is a trap: after the end of every tensor comes a page that must not be read, results
and scratch memory start as NaN, and what lies behind the scratch memory must stay as it was.
"""

import ctypes
import mmap
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import numpy as np
from llama_cpp import llama_cpp as native

from engine.kernels import calls as kernel_calls
from engine.kernels import install as install_kernel
from engine.kernels import library_path as kernel_library
from engine.kernels import wide as sum_wide
from tests.engine.attention_calls import BF16, F16, F32, Call

__all__ = ["AttentionProcess", "MatmulProcess", "Weights", "compute", "kernel_library"]

PAGE = mmap.PAGESIZE
ALIGNMENT = 32  # of every tensor, as ggml's CPU buffers have it
GUARD = b"\xa5" * 4096
PROT_NONE = 0


class _Plan(ctypes.Structure):
    """struct ggml_cplan."""

    _fields_ = (
        ("work_size", ctypes.c_size_t),
        ("work_data", ctypes.c_void_p),
        ("n_threads", ctypes.c_int),
        ("threadpool", ctypes.c_void_p),
        ("abort_callback", ctypes.c_void_p),
        ("abort_callback_data", ctypes.c_void_p),
        ("use_ref", ctypes.c_bool),
    )


class _InitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


_P, _I64, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {  # name: result, arguments
    "ggml_cpu_init": (None, []),
    "ggml_init": (_P, [_InitParams]),
    "ggml_free": (None, [_P]),
    "ggml_new_tensor_4d": (_P, [_P, ctypes.c_int, _I64, _I64, _I64, _I64]),
    "ggml_permute": (_P, [_P, _P, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int]),
    "ggml_nbytes": (ctypes.c_size_t, [_P]),
    "ggml_quantize_chunk": (ctypes.c_size_t, [ctypes.c_int, _P, _P, _I64, _I64, _I64, _P]),
    "ggml_flash_attn_ext": (_P, [_P, _P, _P, _P, _P, _F, _F, _F]),
    "ggml_flash_attn_ext_add_sinks": (None, [_P, _P]),
    "ggml_mul_mat": (_P, [_P, _P, _P]),
    "ggml_view_2d": (_P, [_P, _P, _I64, _I64, ctypes.c_size_t, ctypes.c_size_t]),
    "ggml_backend_view_init": (ctypes.c_int, [_P]),
    "ggml_new_graph": (_P, [_P]),
    "ggml_build_forward_expand": (None, [_P, _P]),
    "ggml_graph_plan": (_Plan, [_P, ctypes.c_int, _P]),
    "ggml_graph_compute": (ctypes.c_int, [_P, ctypes.POINTER(_Plan)]),
    "ggml_backend_cpu_buffer_from_ptr": (_P, [_P, ctypes.c_size_t]),
    "ggml_backend_tensor_alloc": (ctypes.c_int, [_P, _P, _P]),
    "ggml_backend_buffer_free": (None, [_P]),
    "_Z35ggml_backend_cpu_repack_buffer_typev": (_P, []),
    "ggml_backend_buft_alloc_buffer": (_P, [_P, ctypes.c_size_t]),
    "ggml_backend_buffer_get_base": (_P, [_P]),
    "ggml_backend_tensor_set": (None, [_P, _P, ctypes.c_size_t, ctypes.c_size_t]),
}


def _ggml() -> ctypes.CDLL:
    """The library that llama_cpp computes with; all of ggml resolves through its dependencies."""
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(native._lib, name)
        function.restype, function.argtypes = result, arguments
    return native._lib


class _Trap:
    """Memory whose end is the end of what may be touched (up to the alignment)."""

    def __init__(self, size: int, content: bytes | None = None) -> None:
        n_pages = (size + PAGE - 1) // PAGE
        self._memory = mmap.mmap(-1, (n_pages + 1) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.address = start + (n_pages * PAGE - size) // ALIGNMENT * ALIGNMENT
        self.size = size
        ctypes.memset(start, 0xFF, n_pages * PAGE)  # NaN, in 16 bits and in 32
        if content is not None:
            ctypes.memmove(self.address, content, size)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mprotect.argtypes = [_P, ctypes.c_size_t, ctypes.c_int]
        if libc.mprotect(start + n_pages * PAGE, PAGE, PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")

    def floats(self) -> np.ndarray:
        """A copy of the content."""
        return np.frombuffer(ctypes.string_at(self.address, self.size), np.float32).copy()


class _Graph:
    """Tensors in memory of ours."""

    def __init__(self, exits: ExitStack) -> None:
        self.ggml, self._exits = _ggml(), exits
        self.context = self.ggml.ggml_init(_InitParams(1 << 20, None, True))
        exits.callback(self.ggml.ggml_free, self.context)

    def place(self, tensor: int, content: bytes | None = None) -> _Trap:
        """Give a tensor its memory."""
        size = self.ggml.ggml_nbytes(tensor)
        assert content is None or len(content) == size
        trap = _Trap(size, content)
        buffer = self.ggml.ggml_backend_cpu_buffer_from_ptr(trap.address, size)
        self._exits.callback(self.ggml.ggml_backend_buffer_free, buffer)
        assert self.ggml.ggml_backend_tensor_alloc(buffer, tensor, trap.address) == 0
        self._exits.callback(lambda: trap)  # lives as long as the graph
        return trap

    def tensor(self, array: np.ndarray, type: int) -> int:
        """A tensor with this content, its axes the other way round as everywhere in ggml."""
        axes = (1,) * (4 - array.ndim) + array.shape
        tensor = self.ggml.ggml_new_tensor_4d(self.context, type, *axes[::-1])
        self.place(tensor, self._encode(np.ascontiguousarray(array), type))
        return tensor

    def weights(self, weights: "Weights", *, used: int) -> int:
        """A tensor of quantized blocks, repacked if asked for as llama.cpp does it; a view if not all of each
        column is used."""
        tensor, column = self._weights(weights), weights.columns.nbytes // len(weights.columns)
        if used == weights.length:
            return tensor
        view = self.ggml.ggml_view_2d(self.context, tensor, used, len(weights.columns), column, 0)
        assert self.ggml.ggml_backend_view_init(view) == 0
        return view

    def _weights(self, weights: "Weights") -> int:
        n_columns, data = len(weights.columns), weights.columns.tobytes()
        tensor = self.ggml.ggml_new_tensor_4d(self.context, weights.type, weights.length, n_columns, 1, 1)
        if not weights.repacked:
            self.place(tensor, data)
            return tensor
        repacking = self.ggml._Z35ggml_backend_cpu_repack_buffer_typev()
        buffer = self.ggml.ggml_backend_buft_alloc_buffer(repacking, len(data))
        self._exits.callback(self.ggml.ggml_backend_buffer_free, buffer)
        base = self.ggml.ggml_backend_buffer_get_base(buffer)
        assert self.ggml.ggml_backend_tensor_alloc(buffer, tensor, base) == 0
        self.ggml.ggml_backend_tensor_set(tensor, data, 0, len(data))
        return tensor

    def _encode(self, array: np.ndarray, type: int) -> bytes:
        if type == F32:
            return array.astype(np.float32).tobytes()
        if type == F16:
            return array.astype(np.float16).tobytes()
        if type == BF16:
            return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
        values, to = array.astype(np.float32), ctypes.create_string_buffer(array.size * 4)
        n_rows, width = values.size // values.shape[-1], values.shape[-1]
        size = self.ggml.ggml_quantize_chunk(type, values.ctypes.data, to, 0, n_rows, width, None)
        return to.raw[:size]

    def by_head(self, tensor: int) -> int:
        """The view that llama.cpp gives to attention: heads outside, tokens inside."""
        return self.ggml.ggml_permute(self.context, tensor, 0, 2, 1, 3)

    def compute(self, result: int, n_threads: int, *, reference: bool) -> None:
        """Run the graph; the scratch memory has the planned size, to the byte."""
        graph = self.ggml.ggml_new_graph(self.context)
        self.ggml.ggml_build_forward_expand(graph, result)
        plan = self.ggml.ggml_graph_plan(graph, n_threads, None)
        work = ctypes.create_string_buffer(b"\xff" * plan.work_size + GUARD, plan.work_size + len(GUARD))
        plan.work_data, plan.use_ref = ctypes.addressof(work), reference
        assert self.ggml.ggml_graph_compute(graph, ctypes.byref(plan)) == 0
        assert work.raw[plan.work_size :] == GUARD, "wrote behind the scratch memory that it asked for"


def compute(call: Call, n_threads: int = 1, *, reference: bool = False) -> np.ndarray:
    """Attention as ggml computes it in this process: (streams, queries, heads, dv) float32.

    With `reference` as ggml's own reference implementation does.
    """
    n_streams, n_queries, n_heads, _ = call.q.shape
    with ExitStack() as exits:
        graph = _Graph(exits)
        q = graph.by_head(graph.tensor(call.q, F32))
        k = graph.by_head(graph.tensor(call.k, call.k_type))
        v = graph.by_head(graph.tensor(call.v, call.v_type))
        mask = None
        if call.mask is not None:
            mask = graph.tensor(call.mask if call.mask.ndim == 4 else call.mask[:, None], F16)
        result = graph.ggml.ggml_flash_attn_ext(
            graph.context, q, k, v, mask, call.scale, call.max_bias, call.softcap
        )
        if call.sinks is not None:
            graph.ggml.ggml_flash_attn_ext_add_sinks(result, graph.tensor(call.sinks, F32))
        memory = graph.place(result)
        graph.compute(result, n_threads, reference=reference)
        return memory.floats().reshape(n_streams, n_queries, n_heads, call.v.shape[-1])


@dataclass(frozen=True)
class Weights:
    """Columns of quantized blocks."""

    type: int
    length: int  # weights of a column
    columns: np.ndarray  # of bytes, column after column
    repacked: bool


def multiply(weights: Weights, rows: np.ndarray, n_threads: int = 1) -> np.ndarray:
    """(rows, length) float32 times weights, as ggml computes it in this process: (rows, columns) float32.

    Shorter rows meet the first weights of each column.
    """
    with ExitStack() as exits:
        graph = _Graph(exits)
        operands = graph.weights(weights, used=rows.shape[1]), graph.tensor(rows, F32)
        result = graph.ggml.ggml_mul_mat(graph.context, *operands)
        memory = graph.place(result)
        graph.compute(result, n_threads, reference=False)
        return memory.floats().reshape(len(rows), -1)


def _multiply_and_count(
    weights: Weights, groups: list[np.ndarray], n_threads: int
) -> tuple[list[np.ndarray], int]:
    before = kernel_calls("matmul")
    results = [multiply(weights, rows, n_threads) for rows in groups]
    return results, kernel_calls("matmul") - before


def _compute_and_count(call: Call, n_threads: int, reference: bool) -> tuple[np.ndarray, int]:
    before = kernel_calls("attention")
    result = compute(call, n_threads, reference=reference)
    return result, kernel_calls("attention") - before


def _start(with_kernel: bool, wide: bool) -> None:
    _ggml().ggml_cpu_init()
    if with_kernel:
        problem = install_kernel(native._lib)
        if problem:
            raise RuntimeError(problem)
        sum_wide(wide)


class _KernelProcess:
    """A process of its own: the kernels are installed once a process, and for good."""

    def __init__(self, *, with_kernel: bool, wide: bool = False) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, spawn, initializer=_start, initargs=(with_kernel, wide))
        self.taken = 0  # by the kernel, of the calls of the last compute()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process."""
        self._pool.shutdown()


class AttentionProcess(_KernelProcess):
    """A process that computes attention."""

    def compute(self, call: Call, n_threads: int = 1, *, reference: bool = False) -> np.ndarray:
        """As the function; `taken` says afterwards how often the kernel was called."""
        result, self.taken = self._pool.submit(_compute_and_count, call, n_threads, reference).result()
        return result


class MatmulProcess(_KernelProcess):
    """A process that multiplies weights with rows."""

    def compute(self, weights: Weights, groups: list[np.ndarray], n_threads: int = 1) -> list[np.ndarray]:
        """One call of multiply() for each group of rows; `taken` says how often the kernel was called."""
        results, self.taken = self._pool.submit(_multiply_and_count, weights, groups, n_threads).result()
        return results
