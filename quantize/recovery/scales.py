"""A quantized matrix as torch sees it: fixed codes, and the float16 numbers of its blocks that are trained.

Owns the expansion to weights and its gradient. Layouts are `quantize.gguf_files.packing`'s; what is trained,
and by which loss, is decided elsewhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quantize.gguf_files.packing import Format, pack, unpack

PART_WEIGHTS = 1 << 18  # worked on at once: a megabyte of float32


@dataclass(frozen=True, slots=True)
class Packed:
    """A matrix of (rows, n) weights, scale * scales * level +/- minimum * minimums, all but codes by block.

    `levels` (rows, n) int8; `scales`, `minimums` (rows, n / group) int16 or None; `scale`, `minimum`
    (rows, n / block) float32, as they lie in the file.
    """

    form: Format
    levels: Tensor
    scale: Tensor
    minimum: Tensor | None
    scales: Tensor | None
    minimums: Tensor | None

    @classmethod
    def of(cls, form: Format, data: np.ndarray, device: str = "cpu") -> "Packed":
        """Of (rows, row_bytes) uint8 data."""
        blocks = unpack(form, np.ascontiguousarray(data))
        levels = np.array(form.levels, np.int8)[blocks.codes]

        def tensor(values: np.ndarray | None) -> Tensor | None:
            return None if values is None else torch.from_numpy(values).to(device)

        return cls(
            form,
            torch.from_numpy(levels).to(device),
            torch.from_numpy(blocks.scale.astype(np.float32)).to(device),
            None if blocks.minimum is None else tensor(blocks.minimum.astype(np.float32)),
            tensor(blocks.scales),
            tensor(blocks.minimums),
        )

    def values(self, scale: Tensor, minimum: Tensor | None) -> Tensor:
        """The (rows, n) weights with other scales and minimums, in the dtype of the scales."""
        out = torch.empty(self.levels.shape, dtype=scale.dtype, device=scale.device)
        for rows in self._parts():
            part = out[rows].copy_(self.levels[rows]).view(*scale[rows].shape, -1, self.form.group)
            part *= _by_group(scale[rows], self.scales, rows)[..., None]
            if minimum is not None:
                part += (self.form.sign * _by_group(minimum[rows], self.minimums, rows))[..., None]
        return out

    def gradients(self, by_weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """By scale and by minimum, of a gradient by the (rows, n) weights."""
        by_scale = by_weight.new_empty(self.scale.shape)
        by_minimum = None if self.minimum is None else torch.empty_like(by_scale)
        ones = by_weight.new_ones(self.form.group)
        for rows in self._parts():
            part = by_weight[rows]
            # a product with ones sums up short rows several times as fast as `sum` does
            sums = (part * self.levels[rows].to(part.dtype)).view(-1, self.form.group) @ ones
            by_scale[rows] = _by_block(sums, self.scale[rows], self.scales, rows)
            if by_minimum is not None:
                sums = part.reshape(-1, self.form.group) @ ones * self.form.sign
                by_minimum[rows] = _by_block(sums, self.scale[rows], self.minimums, rows)
        return by_scale, by_minimum

    def _parts(self) -> Iterator[slice]:
        """Rows that are worked on while they are in the cache."""
        step = max(1, PART_WEIGHTS // self.levels.shape[1])
        for start in range(0, len(self.levels), step):
            yield slice(start, start + step)


def _by_group(by_block: Tensor, factors: Tensor | None, rows: slice) -> Tensor:
    """(rows, blocks, groups), or (rows, blocks, 1) where a block is one group."""
    each = by_block[..., None]
    return each if factors is None else each * factors[rows].view(*by_block.shape, -1)


def _by_block(by_group: Tensor, like: Tensor, factors: Tensor | None, rows: slice) -> Tensor:
    """(rows, blocks) sums of what stands by group, times its factor."""
    each = by_group.view(*like.shape, -1)
    return (each if factors is None else each * factors[rows].view(each.shape)).sum(-1)


class _Expand(torch.autograd.Function):
    """Weights whose gradient is summed up over each block at once, so that none by code is kept."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, minimum: Tensor | None, packed: Packed) -> Tensor:
        ctx.packed = packed
        return packed.values(scale, minimum)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return *ctx.packed.gradients(grads[0]), None


def expand(packed: Packed, scale: Tensor, minimum: Tensor | None) -> Tensor:
    """The (rows, n) weights, differentiable in scales and minimums."""
    return _Expand.apply(scale, minimum, packed)


def rewrite(form: Format, data: np.ndarray, scale: np.ndarray, minimum: np.ndarray | None) -> np.ndarray:
    """(rows, row_bytes) uint8 data with other float16 scales and minimums; every other bit as it was."""
    blocks = unpack(form, np.ascontiguousarray(data))
    return pack(form, replace(blocks, scale=scale, minimum=minimum))
