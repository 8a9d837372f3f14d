"""Kernels of our own in llama.cpp's CPU backend: attention, and quantized weights times rows.

Their sources say what they do and why (attention.cpp; matmul.cpp, matmul_32.cpp, matmul_32_vnni.cpp,
matmul_256.cpp); what they gain is in docs/log.md. They are compiled when lq is installed (hatch_build.py).
Whatever they do not take, llama.cpp's own kernels compute.
"""

import ctypes
import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

#: llama.cpp's private interface is that of this version: the library names the one it was compiled for.
LLAMA_VERSION = version("llama-cpp-python")
_EXTRA_BUFFER_TYPES = "_Z39ggml_backend_cpu_get_extra_buffer_typesv"
_NEEDED = (
    _EXTRA_BUFFER_TYPES,
    "ggml_barrier",
    "ggml_threadpool_chunk_set",
    "ggml_threadpool_chunk_add",
    "ggml_backend_buffer_name",
    "ggml_backend_buffer_is_host",
)


def library_path() -> Path:
    """Where the compiled kernels lie, if they were compiled."""
    return Path(__file__).parent / "libkernels.so"


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


@functools.cache
def install(llama: Any) -> str | None:
    """Let llama.cpp use the kernels in this process, for good; None when it does, else the reason why not.

    `llama`: libllama as ctypes has loaded it, which finds the symbols of what it was linked with, too.
    No context may compute meanwhile; those that are open use the kernels from their next call on.
    """
    path = library_path()
    if not path.is_file():
        return f"{path.name} is missing: install lq anew where a C++ compiler is"
    try:
        library = _library()
    except OSError as error:
        return f"{path.name} does not load: {error}"
    library.kernels_version.restype = ctypes.c_char_p
    built_for = library.kernels_version().decode()
    if built_for != LLAMA_VERSION:
        return f"compiled for llama-cpp-python {built_for}, not {LLAMA_VERSION}: install lq anew"
    library.kernels_fit_cpu.restype = ctypes.c_bool
    if not library.kernels_fit_cpu():
        return f"{path.name} was compiled for another kind of CPU: install lq anew on this one"
    functions = [getattr(llama, name, None) for name in _NEEDED]
    missing = [name for name, found in zip(_NEEDED, functions, strict=True) if found is None]
    if missing:
        return f"this build of llama.cpp does not show {', '.join(missing)}"
    extra_buffer_types, *table = (ctypes.cast(each, ctypes.c_void_p) for each in functions if each)
    library.kernels_install(extra_buffer_types, (ctypes.c_void_p * len(table))(*table))
    return None


def wide(on: bool) -> None:
    """Whether attention sums in 64 bits from the next call on, so that it matters nowhere where cells lie.

    Costs a fifth of the time of a prompt of 1,500 tokens. For a process that has the kernels; not while one
    computes.
    """
    _library().attention_wide(ctypes.c_bool(on))


def calls(kernel: Literal["attention", "matmul"]) -> int:
    """How often a kernel has computed in this process; -1: it is not for this kind of CPU."""
    return _number(f"{kernel}_calls")


def min_rows() -> int:
    """Of the activations that weights are multiplied with by these kernels; fewer are llama.cpp's."""
    return _number("matmul_min_rows")


def _number(function: str) -> int:
    found = getattr(_library(), function)
    found.restype = ctypes.c_int64
    return found()
