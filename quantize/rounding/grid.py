"""What a matrix is being rounded to while that is sought: scales, integers and levels as torch tensors.

Everything is transposed, (n, rows): a column of the weight is contiguous, and columns are what error feedback
and descent walk along. Owns the nearest level and the way to and from `packing`'s arrays; choosing the
numbers is `scales`', `feedback`'s and `descent`'s.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from quantize.gguf_files.floats import LARGEST_FLOAT16
from quantize.gguf_files.packing import Blocks, Format


@dataclass(slots=True)
class Grid:
    """Numbers of whole blocks: `level` (n, rows) are level values, `scale` and `minimum` (blocks, rows) are
    float16 numbers, `scales` and `minimums` (groups, rows) integers; all are kept as float32.
    """

    form: Format
    level: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    minimums: torch.Tensor | None = None

    def steps(self) -> torch.Tensor:
        """What a level is multiplied with, (groups, rows)."""
        return self.scale if self.scales is None else self.by_group(self.scale) * self.scales

    def by_group(self, values: torch.Tensor) -> torch.Tensor:
        """What a block has, (blocks, rows), for each of its groups, (groups, rows)."""
        return values if self.scales is None else values.repeat_interleave(len(self.scales) // len(values), 0)

    def offsets(self) -> torch.Tensor:
        """What is added to it, (groups, rows); zeros where the format has no minimum."""
        if self.minimum is None:
            return torch.zeros_like(self.scale if self.scales is None else self.scales)
        if self.minimums is None:
            return self.minimum
        return self.by_group(self.minimum) * self.minimums * self.form.sign

    def values(self) -> torch.Tensor:
        """The (n, rows) weights that the numbers stand for."""
        n, rows = self.level.shape
        grouped = self.level.view(-1, self.form.group, rows)
        return (grouped * self.steps()[:, None] + self.offsets()[:, None]).view(n, rows)

    def part(self, first: int, last: int) -> "Grid":
        """A view of columns `first` to `last`, whole blocks."""
        block, group = self.form.block, self.form.group
        blocks, groups = slice(first // block, last // block), slice(first // group, last // group)
        return Grid(
            self.form,
            self.level[first:last],
            self.scale[blocks],
            None if self.minimum is None else self.minimum[blocks],
            None if self.scales is None else self.scales[groups],
            None if self.minimums is None else self.minimums[groups],
        )

    def one_group(self, group: int) -> "Grid":
        """A group of these blocks as a block of its own; only its float16 numbers and integers are shared."""
        owner = group * len(self.scale) // len(self.steps())
        blocks, groups = slice(owner, owner + 1), slice(group, group + 1)
        return Grid(
            self.form,
            self.level[group * self.form.group : (group + 1) * self.form.group],
            self.scale[blocks],
            None if self.minimum is None else self.minimum[blocks],
            None if self.scales is None else self.scales[groups],
            None if self.minimums is None else self.minimums[groups],
        )

    def assign_integers(self, group: int, other: "Grid") -> None:
        """Take the integers of a Grid of one group."""
        for mine, theirs in ((self.scales, other.scales), (self.minimums, other.minimums)):
            if mine is not None and theirs is not None:
                mine[group] = theirs[0]

    def _numbers(self) -> list[torch.Tensor]:
        found = (self.level, self.scale, self.minimum, self.scales, self.minimums)
        return [values for values in found if values is not None]

    def assign(self, other: "Grid") -> None:
        """Overwrite the numbers with another's, in place."""
        for mine, theirs in zip(self._numbers(), other._numbers(), strict=True):
            mine.copy_(theirs)

    def assign_where(self, rows: torch.Tensor, other: "Grid") -> None:
        """Overwrite those of some rows, a boolean each."""
        for mine, theirs in zip(self._numbers(), other._numbers(), strict=True):
            mine.copy_(torch.where(rows, theirs, mine))

    def copy(self) -> "Grid":
        """The same numbers apart."""

        def own(values: torch.Tensor | None) -> torch.Tensor | None:
            return None if values is None else values.clone()

        return Grid(
            self.form, self.level.clone(), self.scale.clone(),
            own(self.minimum), own(self.scales), own(self.minimums),
        )  # fmt: skip


def from_blocks(form: Format, blocks: Blocks) -> Grid:
    """The same numbers, transposed."""

    def turned(values: np.ndarray | None) -> torch.Tensor | None:
        return None if values is None else torch.from_numpy(np.ascontiguousarray(values.T, np.float32))

    level = turned(np.array(form.levels, np.float32)[blocks.codes])
    scale = turned(blocks.scale)
    assert level is not None  # for the type checker
    assert scale is not None
    return Grid(form, level, scale, turned(blocks.minimum), turned(blocks.scales), turned(blocks.minimums))


def to_blocks(grid: Grid) -> Blocks:
    """The arrays that `packing.pack` takes."""

    def turned(values: torch.Tensor | None, kind: type) -> np.ndarray | None:
        return None if values is None else np.ascontiguousarray(values.numpy().T.astype(kind))

    level = grid.level.numpy().T
    if grid.form.is_uniform:
        codes = (level - np.float32(grid.form.levels[0])).astype(np.uint8)
    else:
        codes = np.searchsorted(np.array(grid.form.levels), level).astype(np.uint8)
    scale = turned(grid.scale, np.float16)
    assert scale is not None
    return Blocks(
        np.ascontiguousarray(codes),
        scale,
        turned(grid.minimum, np.float16),
        turned(grid.scales, np.int16),
        turned(grid.minimums, np.int16),
    )


def nearest(form: Format, scaled: torch.Tensor) -> torch.Tensor:
    """The nearest level to each value; `scaled` is overwritten."""
    if form.is_uniform:
        return scaled.round_().clamp_(lowest_level(form), form.levels[-1])
    # Midpoints between levels are multiples of a half, so the lower half below a value decides.
    lowest, table = by_halves(form)
    place = scaled.mul_(2).floor_().clamp_(lowest, lowest + len(table) - 1).sub_(lowest)
    return table.index_select(0, place.view(-1).to(torch.int32)).view(scaled.shape)


def lowest_level(form: Format) -> int:
    """Q8_0's own is left out: -128 has no counterpart above, and llama.cpp's kernels take absolute values."""
    return max(form.levels[0], -127)


@cache
def by_halves(form: Format) -> tuple[int, torch.Tensor]:
    """The nearest level to the values between k / 2 and (k + 1) / 2, and the lowest k."""
    lowest, highest = 2 * form.levels[0], 2 * form.levels[-1]
    centres = (torch.arange(lowest, highest + 1) + 0.5) / 2
    places = torch.bucketize(centres, torch.from_numpy(form.midpoints))
    return lowest, torch.tensor(form.levels, dtype=torch.float32)[places]


def inverse(values: torch.Tensor) -> torch.Tensor:
    """1 / values, and 0 where they are 0 or so small that it would be infinite."""
    turned = values.reciprocal()
    return torch.where(turned.isfinite(), turned, 0.0)


def half(values: torch.Tensor) -> torch.Tensor:
    """The float16 number nearest to each value, as float32, never infinite."""
    return values.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).to(torch.float16).to(torch.float32)
