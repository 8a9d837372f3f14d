"""Steps that know whether they are done: each has inputs, parameters, outputs, and a manifest that says so.

A step's key hashes its parameters and the keys of what it needs, so a changed parameter redoes exactly what
depends on it. What a finished step needed is not made again, even when it was deleted to save disk. Knows
nothing of models.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from models.atomic import whole

#: Counts changes of what the steps compute; older manifests are then redone.
VERSION = 2

Facts = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Step:
    """One piece of work. `make` writes `outputs` (each whole or not at all); it returns facts.

    `least_bytes` is what the outputs will hold at least, where that is known and much.
    """

    name: str
    make: Callable[[], Facts]
    parameters: Mapping[str, Any]
    needs: tuple["Step", ...] = ()
    outputs: tuple[Path, ...] = ()
    least_bytes: int = 0

    @property
    def key(self) -> str:
        """Hex digest of everything the result depends on."""
        needed = [(step.name, step.key) for step in self.needs]
        text = json.dumps([VERSION, self.name, self.parameters, needed], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Ledger:
    """The folder of manifests, one JSON file a step."""

    folder: Path

    def facts(self, step: Step) -> Facts | None:
        """What a finished step recorded; None when it has to run."""
        record = self._read(step.name)
        if record is None or record["key"] != step.key:
            return None
        if [self._stamp(path) for path in step.outputs] != record["outputs"]:
            return None
        return record["facts"]

    def recorded(self, step: Step) -> Facts | None:
        """The same, even where its outputs were deleted since."""
        record = self._read(step.name)
        return record["facts"] if record is not None and record["key"] == step.key else None

    def ensure(self, step: Step) -> Facts:
        """Run a step, and what it needs, unless its manifest says it is done."""
        facts = self.facts(step)
        if facts is not None:
            return facts
        for needed in step.needs:
            self.ensure(needed)
        started = time.monotonic()
        facts = step.make()
        self._write(step, facts, time.monotonic() - started)
        return json.loads(json.dumps(facts))

    def pending(self, steps: Iterable[Step]) -> list[Step]:
        """What `ensure` would run for all of these, each once."""
        found: dict[str, Step] = {}
        for step in steps:
            if step.name not in found and self.facts(step) is None:
                found |= {needed.name: needed for needed in self.pending(step.needs)}
                found[step.name] = step
        return list(found.values())

    def seconds(self, step: Step) -> float:
        """How long a finished step took."""
        record = self._read(step.name)
        return record["seconds"] if record else 0.0

    def _read(self, name: str) -> dict[str, Any] | None:
        try:
            return json.loads((self.folder / f"{name}.json").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return None

    def _write(self, step: Step, facts: Facts, seconds: float) -> None:
        record = {
            "step": step.name,
            "key": step.key,
            "parameters": step.parameters,
            "needs": {needed.name: needed.key for needed in step.needs},
            "outputs": [self._stamp(path) for path in step.outputs],
            "facts": facts,
            "seconds": round(seconds, 2),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text(self.folder / f"{step.name}.json", json.dumps(record, indent=1, default=str))

    def _stamp(self, path: Path) -> list[Any]:
        """What changes when a file does; path relative, so that the folder may be moved."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return [path.name, None, None]
        return [path.name, stat.st_size, stat.st_mtime_ns]


def write_text(path: Path, text: str) -> None:
    """Write a file that appears whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file that appears whole or not at all, and is on the disk then."""
    with whole(path) as partial:
        partial.write_bytes(data)
