"""The file under test: NAME, NAME:TYPE or a path.

The type decides serving speed more than anything else (Q4_0 decodes eight sequences at twice the speed of
Q4_1), so that the embedded default is measured as Q4_0: it is requantized once, into the cache of llama.cpp's
tools. What such a file writes is a little worse than what a Q4_0 made of the full weights would; how fast is
the same.
"""

import os
import re
import subprocess
from pathlib import Path

import psutil
from platformdirs import user_cache_path

from benchmarks.peer import peer_binaries
from benchmarks.serving.catalogue import Shape
from models.footprint import footprint, pieces_of
from models.gguf import read_header
from models.store import Store

#: llama-server keeps prompts of idle slots in RAM, by its default up to this much.
PEER_CACHE_BYTES = 8 << 30


class NoRoom(RuntimeError):
    """Too little memory for two servers beside each other."""

    def __init__(self, needed: int, free: int) -> None:
        super().__init__(
            f"two servers need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; lower --slots or "
            "--n-ctx, or name a smaller --model"
        )


def model_file(name: str) -> Path:
    """The GGUF that `name` means; pulls and requantizes where that is needed."""
    if Path(name).suffix == ".gguf":
        return Store.default().resolve_model(name)
    plain, _, kind = name.partition(":")
    source = Store.default().resolve_or_pull(plain)
    return requantized(source, plain, kind) if kind else source


def requantized(source: Path, name: str, kind: str) -> Path:
    """The same model in another type, in the cache; made on first use."""
    if not re.fullmatch(r"[A-Z0-9_]+", kind):
        raise ValueError(
            f"--model {name}:{kind}: {kind!r} is no type of llama-quantize, such as Q4_0 or IQ4_NL"
        )
    folder = user_cache_path("lq") / "bench"
    target = folder / f"{name}-{kind}.gguf"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}.part")
        command = [peer_binaries() / "llama-quantize", "--allow-requantize", source, part, kind]
        made = subprocess.run(command, capture_output=True, check=False)
        if made.returncode:
            part.unlink(missing_ok=True)
            said = (made.stdout + made.stderr).decode("utf-8", "replace")[-1000:]
            raise RuntimeError(f"llama-quantize could not make {kind} of {source.name}:\n{said}")
        part.replace(target)
    return target


def require_room(model: Path, shape: Shape, slots: int) -> str | None:
    """Refuse what cannot fit; a warning where it fits only while llama-server's prompt cache stays small."""
    cells = shape.kv_cells or shape.n_ctx * slots
    needed = 2 * footprint(pieces_of(read_header(model)), n_cells=cells, n_parallel=slots).total_bytes
    free = psutil.virtual_memory().available
    if needed > free:
        raise NoRoom(needed, free)
    if needed + PEER_CACHE_BYTES > free:
        return (
            f"{free / 1e9:.1f} GB are free and llama-server's prompt cache may grow to 8.6 GB: "
            "--peer-option=--cache-ram=1024 bounds it"
        )
    return None
