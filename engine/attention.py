"""The attention kernel of our own (kernels/attention.cpp), put into llama.cpp's CPU backend.

Against llama.cpp's kernels at 1,500 tokens of context it writes 1.7 to 2.2 times and reads small chunks of
prompts 2.3 times as fast, and a text does not depend on what else is computed beside it (docs/log.md). It is
compiled when lq is installed (hatch_build.py) and used for keys and values in f16 on a CPU; everything else
is computed by llama.cpp's own kernels.
"""

import ctypes
import functools
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llama_cpp import llama_cpp as native

#: llama.cpp's private interface is that of this version: the library names the one it was compiled for.
LLAMA_VERSION = version("llama-cpp-python")
_EXTRA_BUFFER_TYPES = "_Z39ggml_backend_cpu_get_extra_buffer_typesv"
_NEEDED = (_EXTRA_BUFFER_TYPES, "ggml_barrier", "ggml_threadpool_chunk_set", "ggml_threadpool_chunk_add")


def library_path() -> Path:
    """Where the compiled kernel lies, if it was compiled."""
    return Path(__file__).parent / "kernels" / "libattention.so"


@functools.cache
def install() -> str | None:
    """Let llama.cpp use the kernel in this process, for good; None when it does, else the reason why not.

    Contexts that are open already use it from their next call on.
    """
    path = library_path()
    if not path.is_file():
        return f"the kernel was not compiled: {path.name} is missing; install lq anew where a C++ compiler is"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"the kernel does not load: {error}"
    library.attention_version.restype = ctypes.c_char_p
    built_for = library.attention_version().decode()
    if built_for != LLAMA_VERSION:
        return (
            f"the kernel was compiled for llama-cpp-python {built_for}, not {LLAMA_VERSION}: install lq anew"
        )
    if not library.attention_fits_cpu():
        return "the kernel was compiled for another kind of CPU: install lq anew on this one"
    llama: Any = native._lib  # finds what it was linked with too
    functions = [getattr(llama, name, None) for name in _NEEDED]
    missing = [name for name, found in zip(_NEEDED, functions, strict=True) if found is None]
    if missing:
        return f"this build of llama.cpp does not show {', '.join(missing)}"
    library.attention_install(*(ctypes.cast(each, ctypes.c_void_p) for each in functions if each))
    return None


def calls() -> int:
    """How often the kernel has computed attention in this process."""
    library = ctypes.CDLL(str(library_path()))
    library.attention_calls.restype = ctypes.c_int64
    return library.attention_calls()
