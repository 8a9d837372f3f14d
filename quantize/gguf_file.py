"""Write a GGUF whose tensors arrive one block at a time; the destination is whole or untouched.

Owns the partial file beside the destination, its padding, flushing and renaming. Knows nothing of models.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np

from quantize.errors import QuantizeError
from quantize.plan import Output

#: (what, bytes done, bytes in all)
Progress = Callable[[str, int, int | None], None]
TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(QuantizeError):
    """No room for the file; nothing is left at the destination."""

    def __init__(self, out: Path, needed_bytes: int) -> None:
        free = shutil.disk_usage(out.parent).free
        super().__init__(
            f"no room for {out}: it needs {needed_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free; "
            "free space or choose another folder"
        )


class WrongSize(QuantizeError):
    """A tensor that yielded more or fewer bytes than announced: a file changed while it was read."""

    def __init__(self, output: Output, written: int) -> None:
        super().__init__(
            f"tensor {output.name} came to {written} bytes instead of {output.size_bytes}; run again"
        )


def announce(writer: gguf.GGUFWriter, outputs: Sequence[Output]) -> None:
    """Tell the writer names, shapes and types; the data comes later."""
    for output in outputs:
        writer.add_tensor_info(
            output.name, output.shape, np.dtype(np.float32), output.size_bytes, raw_dtype=TYPES[output.dtype]
        )


def write(
    out: Path, writer: gguf.GGUFWriter, outputs: Sequence[Output], *, progress: Progress | None = None
) -> None:
    """Write header and tensors beside `out`, flush them to the disk, and rename; raises DiskFull."""
    total = sum(output.size_bytes for output in outputs)
    out.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out.parent).free < total:
        raise DiskFull(out, total)
    with _partial(out, total) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        _append(partial, outputs, writer.data_alignment, total, progress)
        partial.replace(out)
    _flush_folder(out.parent)


@contextmanager
def _partial(out: Path, total: int) -> Iterator[Path]:
    """The path to write to; removed on any failure."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        yield partial
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno in FULL:
            raise DiskFull(out, total) from None
        raise
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _append(
    partial: Path, outputs: Sequence[Output], alignment: int, total: int, progress: Progress | None
) -> None:
    done = 0
    with partial.open("ab") as file:
        for output in outputs:
            file.write(bytes(-file.tell() % alignment))
            written = 0
            for block in output.blocks():
                written += file.write(np.ascontiguousarray(block).data.cast("B"))
                if progress is not None:
                    progress("convert", done + written, total)
            if written != output.size_bytes:
                raise WrongSize(output, written)
            done += written
        file.write(bytes(-file.tell() % alignment))
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make the renaming itself last."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
