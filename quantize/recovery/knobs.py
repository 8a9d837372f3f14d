"""The numbers that are trained: where each started, in which unit it moves, and what of it a file can hold.

A knob's tensor is start + unit * offset; offsets start at zero, so decay pulls back to the file as it was.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quantize.gguf_files.floats import LARGEST_FLOAT16
from quantize.recovery.scales import Packed

Kind = Literal["norms", "scales", "rows"]


@dataclass(frozen=True, slots=True, eq=False)
class Knob:
    """One trained tensor."""

    kind: Kind
    start: Tensor
    unit: Tensor
    offset: Tensor

    @classmethod
    def of(cls, kind: Kind, start: Tensor, unit: Tensor) -> "Knob":
        """With an offset of zeros that asks for gradients."""
        return cls(kind, start, unit, torch.zeros_like(start).requires_grad_())

    def value(self) -> Tensor:
        """The tensor, differentiable in its offset."""
        return self.start + self.unit * self.offset


def as_half(value: Tensor) -> Tensor:
    """Float32 as the file will hold it: one that did not move keeps its bits; none becomes infinite."""
    return value.clamp(-LARGEST_FLOAT16, LARGEST_FLOAT16).half().float()


def vector_knob(start: Tensor) -> Knob:
    """Of a norm's weights or a bias: all move in the unit of their root mean square."""
    rms = start.square().mean().sqrt()
    return Knob.of("norms", start, rms.expand_as(start))


def scale_knob(packed: Packed) -> Knob:
    """Of the scales: each moves in the unit of itself."""
    return Knob.of("scales", packed.scale, packed.scale.abs())


def row_knob(packed: Packed) -> Knob:
    """Of a factor for each row, (rows, 1), that all its scales and minimums are multiplied with: few numbers
    for which each text says much."""
    ones = packed.scale.new_ones(len(packed.scale), 1)
    return Knob.of("rows", ones, ones)


def minimum_knob(packed: Packed) -> Knob | None:
    """Of the minimums; None in formats that have none.

    A K-quant's moves in the unit of itself. Where the minimum is the block's offset, which may be zero, its
    unit is what the scale's moves the block's middle by.
    """
    if packed.minimum is None:
        return None
    unit = packed.minimum.abs()
    if packed.minimums is None:
        unit = packed.scale.abs() * (packed.form.levels[-1] / 2)
    return Knob.of("scales", packed.minimum, unit)
