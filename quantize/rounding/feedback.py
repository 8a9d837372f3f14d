"""Error feedback: round a matrix column by column and let the columns to come make up for each error.

With U the factor of the inverse Hessian, rounding column j off by e = (w_j - q_j) / U_jj is best answered by
taking e * U_jk from every later column k. Columns go in their natural order, so that a block's scales are
chosen for the weights as they are when its first column is reached. Frantar et al., GPTQ, 2022; written for
llama.cpp's blocks.
"""

from dataclasses import dataclass

import torch

from quantize.rounding import kernels
from quantize.rounding.curvature import Curvature
from quantize.rounding.grid import Grid, inverse, nearest
from quantize.rounding.scales import refine_integers, search

LAZY = 32  # columns after which the rest of the matrix is told of their errors; a multiple of every group


def feed_back(
    weights: torch.Tensor,
    curvature: Curvature,
    start: Grid,
    *,
    choose_scales: bool = True,
    conditional: bool = True,
    quick: bool = False,
) -> None:
    """Set `start`'s levels, and with `choose_scales` its scales, for (n, rows) weights.

    `conditional`: scales weigh a column's error by 1 / U_jj^2, what is left of its cost once later columns
    have made up for it; otherwise by the Hessian's diagonal. `quick`: see `scales.search`.
    """
    importance = curvature.factor.diagonal().pow(-2) if conditional else curvature.diagonal.contiguous()
    walk = _Walk(weights.clone(), curvature.factor, importance if choose_scales else None, quick)
    width = max(start.form.block, LAZY)
    for first in range(0, len(weights), width):
        walk.block(start.part(first, first + width), first)


@dataclass(frozen=True, slots=True)
class _Walk:
    """The weights as they are by now (n, rows), U, and what errors weigh where scales are to be chosen."""

    current: torch.Tensor
    factor: torch.Tensor
    importance: torch.Tensor | None
    quick: bool

    def block(self, block: Grid, first: int) -> None:
        """Round the columns of one block, which starts at `first`, and tell all later ones."""
        last = first + len(block.level)
        if self.importance is not None:
            weights, importance = self.current[first:last], self.importance[first:last]
            block.assign(search(block.form, weights, importance, quick=self.quick))
        for begin in range(first, last, LAZY):
            end = begin + LAZY
            errors = self._stretch(block, begin - first, begin)
            if end < len(self.current):
                self.current[end:].addmm_(self.factor[begin:end, end:].T, errors, alpha=-1)

    def _stretch(self, block: Grid, within: int, begin: int) -> torch.Tensor:
        """Round LAZY columns from `begin`, `within` of their block; returns their errors (LAZY, rows)."""
        size, end = block.form.group, begin + LAZY
        errors = torch.empty(LAZY, self.current.shape[1])
        for at in range(within, within + LAZY, size):
            group = at // size
            column = begin + at - within
            if group and block.form.scales and self.importance is not None:
                self._choose_again(block, group, column, self.importance)
            if kernels.are_there():
                later, own = slice(column, end), slice(column - begin, column - begin + size)
                factor = self.factor[later, later]
                kernels.feed_back(block.one_group(group), self.current[later], factor, errors[own])
                continue
            step, offset = block.steps()[group], block.offsets()[group]
            inverse_step = inverse(step)
            for j in range(column, column + size):
                weight = self.current[j]
                level = nearest(block.form, (weight - offset) * inverse_step)
                block.level[at + j - column] = level
                error = (weight - (level * step + offset)) / self.factor[j, j]
                errors[j - begin] = error
                if j + 1 < end:
                    self.current[j + 1 : end].addcmul_(self.factor[j, j + 1 : end, None], error, value=-1)
        return errors

    def _choose_again(self, block: Grid, group: int, column: int, importance: torch.Tensor) -> None:
        """Choose a group's integers for its weights as they have become, the float16 numbers being fixed."""
        part, columns = block.one_group(group), slice(column, column + block.form.group)
        refine_integers(part, self.current[None, columns], importance[None, columns, None])
        block.assign_integers(group, part)
