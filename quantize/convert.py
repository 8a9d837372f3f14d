"""Turn a Hugging Face checkpoint into a GGUF, tensor by tensor.

Owns the order of the work and the file at the destination; families know names and shapes,
`checkpoint` knows safetensors, `vocabulary` knows tokenizers. Never imports torch or transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from models.gguf import Header
    from models.lora import Adapter

#: (what, bytes done, bytes in all)
Progress = Callable[[str, int, int | None], None]
Dtype = Literal["F32", "F16", "BF16"]


def convert(
    checkpoint: Path,
    out: Path,
    *,
    dtype: Dtype | None = None,
    adapter: "Adapter | None" = None,
    pre: str | None = None,
    progress: Progress | None = None,
) -> "Header":
    """Write `out` from a checkpoint folder; `dtype` None keeps the checkpoint's own."""
    raise NotImplementedError
