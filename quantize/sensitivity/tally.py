"""What a backward pass has measured so far, and its file, from which a killed pass goes on.

Knows nothing of models; `quantize.sensitivity.backward` fills it, `Sensitivities` is what becomes of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from models.atomic import whole
from quantize.sensitivity.inputs import BLOCKS
from quantize.sensitivity.projection import BadRounding, RoundingErrors
from quantize.sensitivity.record import Sensitivities

_SUMS = "traces", "kronecker", "squares"
_FIELDS = ("types", "projections", *_SUMS, "inputs", "share")


@dataclass(slots=True)
class Entry:
    """One tensor's measurements: `projections` (draws, windows, types), `inputs` (windows, BLOCKS), `share`
    (), the others (types,)."""

    types: np.ndarray
    projections: np.ndarray
    traces: np.ndarray
    kronecker: np.ndarray
    squares: np.ndarray
    inputs: np.ndarray
    share: np.ndarray


@dataclass(slots=True)
class Tally:
    """Entries by tensor; `next_layer` comes next, given `gradient` (draws, windows, tokens, n_embd) by its
    output. `touched` holds the tied head's errors in the rows that occur, for the lookup at the end."""

    key: str
    next_layer: int
    gradient: Tensor
    entries: dict[str, Entry] = field(default_factory=dict)
    touched: np.ndarray | None = None

    def save(self, folder: Path) -> None:
        """Write the state; it appears whole or not at all."""
        if self.touched is not None and not (kept := folder / "touched.npy").exists():
            with whole(kept) as partial, partial.open("wb") as file:
                np.save(file, self.touched)
        arrays = {f"{n}/{f}": getattr(entry, f) for n, entry in self.entries.items() for f in _FIELDS}
        with whole(folder / "tally.npz") as partial, partial.open("wb") as file:
            np.savez(
                file,
                key=np.array(self.key),
                next_layer=np.array(self.next_layer),
                gradient=self.gradient.cpu().numpy(),
                **arrays,
            )

    @classmethod
    def load(cls, folder: Path, key: str, device: str) -> "Tally | None":
        """The state with this key, None where there is none."""
        try:
            with (folder / "tally.npz").open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                if str(file["key"]) != key:
                    return None
                fields = {name: file[name] for name in file.files}
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            return None
        kept = folder / "touched.npy"
        names = dict.fromkeys(name.rpartition("/")[0] for name in fields if "/" in name)
        return cls(
            key,
            int(fields["next_layer"]),
            torch.from_numpy(fields["gradient"]).to(device),
            {name: Entry(*(fields[f"{name}/{f}"] for f in _FIELDS)) for name in names},
            np.load(kept) if kept.exists() else None,
        )

    @staticmethod
    def remove(folder: Path) -> None:
        """Delete the state."""
        for name in ("tally.npz", "touched.npy"):
            (folder / name).unlink(missing_ok=True)

    def sensitivities(self, names: Sequence[str], *, n_scored: int) -> Sensitivities:
        """The record of all entries, in the order of `names`."""
        known = tuple(name for name in names if name in self.entries)
        types = tuple(dict.fromkeys(str(kind) for name in known for kind in self.entries[name].types))
        n_draws, n_windows = self.gradient.shape[:2]
        projections = np.full((n_windows * n_draws, len(known), len(types)), np.nan, np.float32)
        sums = {field: np.full((len(known), len(types)), np.nan) for field in _SUMS}
        inputs = np.stack([np.square(self.entries[name].inputs).mean(0) for name in known]) / (2 * n_scored)
        for row, name in enumerate(known):
            entry = self.entries[name]
            columns = [types.index(str(kind)) for kind in entry.types]
            by_window = entry.projections.swapaxes(0, 1).reshape(-1, len(columns))
            projections[:, row, columns] = by_window
            for field_name, values in sums.items():
                values[row, columns] = getattr(entry, field_name)
        shares = np.array([float(self.entries[name].share) for name in known])
        return Sensitivities(
            self.key, known, types, n_scored, n_draws, projections, **sums, inputs=inputs, shares=shares
        )


class Sums:
    """One tensor's measurements while they are added up, on the CPU in float64."""

    def __init__(self, n_draws: int, n_windows: int) -> None:
        self._shape = (n_draws, n_windows)
        self.types: tuple[str, ...] | None = None

    def begin(self, name: str, made: RoundingErrors) -> None:
        """Make room at the first rows; check that later rows have the same types."""
        if self.types is None:
            self.types = made.types
            self.share = made.sample.share if made.sample else 1.0
            self.projections = torch.zeros(*self._shape, len(made.types)).double()
            self.inputs = torch.zeros(self._shape[1], len(BLOCKS)).double()
            self.traces, self.kronecker, self.squares = torch.zeros(3, len(made.types)).double().unbind()
        elif self.types != made.types:
            raise BadRounding(
                name, ", ".join(made.types), f"other types than before ({', '.join(self.types)})"
            )

    def add(self, draw: int, part: slice, projections: Tensor) -> None:
        """Add (windows, types) of some windows."""
        self.projections[draw, part] += projections.cpu().double()

    def add_inputs(self, part: slice, projections: Tensor) -> None:
        """Add (windows, blocks) of some windows, of one draw."""
        self.inputs[part] += projections.cpu().double()

    def entry(self) -> Entry:
        """What was added up."""
        return Entry(
            np.array(self.types),
            self.projections.float().numpy(),
            *(sums.numpy() for sums in (self.traces, self.kronecker, self.squares, self.inputs)),
            share=np.array(self.share),
        )
