"""The folder of a run: whose it is, and that nobody else works in it.

A run is what its weights depend on. The same command finds its own folder and goes on; another one is told
what differs.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from models.atomic import LEFT_BEHIND
from quantize.errors import QuantizeError
from quantize.steps import write_text


class FolderTaken(QuantizeError):
    """A folder that belongs to something else."""

    def __init__(self, out: Path, problem: str) -> None:
        super().__init__(f"--out {out}: {problem}; choose another --out, or delete this folder")


@dataclass(frozen=True, slots=True)
class Folder:
    """Where a run puts what."""

    out: Path

    @property
    def work(self) -> Path:
        """What is only of use to the run itself."""
        return self.out / "work"

    @property
    def state(self) -> Path:
        """Where the training stands."""
        return self.work / "state.safetensors"

    @property
    def adapter(self) -> Path:
        """The PEFT folder."""
        return self.out / "adapter"

    @property
    def gguf(self) -> Path:
        """The adapter for llama.cpp."""
        return self.out / "adapter.gguf"

    @contextmanager
    def claimed(self, identity: dict[str, Any]) -> Iterator[None]:
        """Keep others out meanwhile; raises FolderTaken where it holds, or is worked in by, another run."""
        self._check(identity)
        self.work.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.work / ".lock", timeout=0):
                self._check(identity)
                for left in (*self.out.rglob(LEFT_BEHIND),):
                    left.unlink()  # by a run that was killed
                write_text(self.work / "run.json", json.dumps(identity, indent=1))
                yield
        except Timeout:
            raise FolderTaken(self.out, "another `lq tune` works in it") from None

    def _check(self, identity: dict[str, Any]) -> None:
        if not self.out.is_dir():
            return
        try:
            found = json.loads((self.work / "run.json").read_text("utf-8"))
        except FileNotFoundError:
            ours = (self.work, self.work / ".lock")
            found = (*self.out.iterdir(), *(self.work.iterdir() if self.work.is_dir() else ()))
            strange = sorted(
                path.relative_to(self.out).as_posix()
                for path in found
                if path not in ours and not path.match(LEFT_BEHIND)
            )
            if strange:
                raise FolderTaken(self.out, f"holds other files ({', '.join(strange[:3])})") from None
            return
        except ValueError:
            raise FolderTaken(self.out, "its work/run.json cannot be read") from None
        for key in identity | found:
            if found.get(key) != identity.get(key):
                change = f"{key} was {found.get(key)} there and is {identity.get(key)} now"
                raise FolderTaken(self.out, f"is of another run: {change}")
