"""Write a GGUF whose tensors arrive one block at a time; the destination is whole or untouched.

Owns the order of the bytes and their padding. Knows nothing of models.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

from models.atomic import whole
from quantize.disk import DiskFull, disk_errors
from quantize.errors import QuantizeError
from quantize.plan import Output

#: (what, bytes done, bytes in all)
Progress = Callable[[str, int, int | None], None]
TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


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
        raise DiskFull(out, f"it needs {total / 1e6:.0f} MB")
    with disk_errors(out), whole(out) as partial:
        writer.write_header_to_file(partial)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        _append(partial, outputs, writer.data_alignment, total, progress)


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
