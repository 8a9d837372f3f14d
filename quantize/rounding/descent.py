"""Coordinate descent on the rounding loss: a block's scales and codes at their best, all others being fixed.

With R = H (W - Q), moving code j alone is best done to Q_j + R_j / H_jj; a group's scale and offset have
their optimum from the group's own part of H and of R; and a whole block is rounded anew for the weights
Q_b + H_bb^-1 R_b. No move raises the (damped) loss. Owns R and how it is kept up to date, once a stretch
of blocks; where the start comes from is the caller's.
"""

from dataclasses import dataclass

import torch

from quantize.rounding import kernels
from quantize.rounding.curvature import Curvature
from quantize.rounding.feedback import LAZY, feed_back
from quantize.rounding.grid import Grid, half, inverse, nearest

ENOUGH = 0.002  # of the loss: a pass that gains less is the last
STRETCH = 256  # columns, whole blocks, after which all others are told of their moves
PASSES_ANEW = 2  # rounding whole blocks anew costs most and gains least later on


def descend(
    weights: torch.Tensor, curvature: Curvature, grid: Grid, *, passes: int, anew: bool = True
) -> int:
    """Lower the loss of `grid`, in place, by up to so many passes over all blocks; returns the passes made.

    `anew`: the first passes also round blocks anew as a whole, and keep that for rows where it is better.
    """
    size = grid.form.block
    pull = curvature.damped @ (weights - grid.values())
    before = torch.inf
    for done in range(passes):
        loss = float(((weights - grid.values()) * pull).sum(dtype=torch.float64))
        if loss > before * (1 - ENOUGH):
            return done
        before = loss
        for begin in range(0, len(weights), max(size, STRETCH)):
            stretch = slice(begin, begin + max(size, STRETCH))
            near = pull[stretch].clone()
            moves = torch.empty_like(near)
            for at in range(0, len(near), size):
                own, first, last = slice(at, at + size), begin + at, begin + at + size
                visit = Visit(grid.part(first, last), curvature.part(first, last), near[own].clone())
                moves[own] = visit.run(anew=anew and done < PASSES_ANEW)
                near.addmm_(curvature.damped[stretch, first:last], moves[own], alpha=-1)
            pull.addmm_(curvature.damped[:, stretch], moves, alpha=-1)
    return passes


@dataclass(slots=True)
class Visit:
    """One block, its own part of H, and its own part of R, which is kept up to date by every move."""

    block: Grid
    curvature: Curvature
    pull: torch.Tensor

    @property
    def local(self) -> torch.Tensor:
        return self.curvature.damped

    def run(self, *, anew: bool) -> torch.Tensor:
        """Make all moves; returns by how much the values have changed, (block, rows)."""
        before = self.block.values()
        if anew:
            self.round_anew(before)
        if self.block.scales is not None:
            for group in range(len(self.block.scales)):
                self.move_integers(group)
        self.move_halves()
        self.move_codes()
        return self.block.values() - before

    def round_anew(self, before: torch.Tensor) -> None:
        """Choose scales and codes together by error feedback; rows that gain nothing stay as they are."""
        factor, trial = self.curvature.factor, self.block.copy()
        feed_back(before + factor.T @ (factor @ self.pull), self.curvature, trial, quick=True)
        move = trial.values() - before
        curved = self.local @ move
        better = ((2 * self.pull - curved) * move).sum(0) > 0
        self.block.assign_where(better, trial)
        self.pull -= curved * better

    def move_codes(self) -> None:
        """Move every code once, column by column; columns far away are told a stretch at a time."""
        steps, group = self.block.steps(), self.block.form.group
        for begin in range(0, len(self.block.level), LAZY):
            stretch = slice(begin, begin + LAZY)
            near, level = self.local[stretch, stretch], self.block.level[stretch]
            own = steps[begin // group : (begin + LAZY) // group]
            if kernels.are_there():
                moves = kernels.move_codes(self.block.form, self.pull[stretch], near, own, level)
            else:
                moves = self._moves(self.pull[stretch].clone(), near, own, level)
            self.pull.addmm_(self.local[:, stretch], moves, alpha=-1)

    def _moves(
        self, pull: torch.Tensor, near: torch.Tensor, steps: torch.Tensor, level: torch.Tensor
    ) -> torch.Tensor:
        """Of a stretch, by how much its values change; `level` and `pull` are changed."""
        inverse_steps, diagonal = inverse(steps), near.diagonal().tolist()
        moves = torch.empty_like(pull)
        for j in range(len(level)):
            group = j // self.block.form.group
            wanted = pull[j] * (inverse_steps[group] / diagonal[j])
            moved = nearest(self.block.form, wanted.add_(level[j]))
            moves[j] = (moved - level[j]) * steps[group]
            level[j] = moved
            pull.addcmul_(near[:, j, None], moves[j], value=-1)
        return moves

    def move_integers(self, group: int) -> None:
        """Move one group's integers to the best ones near the optimum."""
        block, form = self.block, self.block.form
        assert block.scales is not None
        assert form.scales is not None
        columns = slice(group * form.group, (group + 1) * form.group)
        level, unit, inverse_unit = block.level[columns], block.scale[0], inverse(block.scale[0])
        ones = None if block.minimum is None else torch.ones_like(level)
        slopes = Slopes.of(self.local[columns, columns], self.pull[columns], level, ones)
        _, shift = slopes.best()
        best = a = b = torch.zeros_like(shift)
        for down in (-0.5, 0.5) if block.minimums is not None else (0.0,):
            moved = torch.zeros_like(shift)
            if block.minimums is not None and block.minimum is not None and form.minimums is not None:
                each = block.minimum[0] * form.sign
                wanted = (block.minimums[group] + shift * inverse(each) + down).round_()
                moved = (wanted.clamp_(form.minimums[0], form.minimums[-1]) - block.minimums[group]) * each
            wanted = (block.scales[group] + slopes.best_given(moved) * inverse_unit).round_()
            stepped = (wanted.clamp_(form.scales[0], form.scales[-1]) - block.scales[group]) * unit
            gain = slopes.gain(stepped, moved)
            better = gain > best
            best, a = torch.where(better, gain, best), torch.where(better, stepped, a)
            b = torch.where(better, moved, b)
        block.scales[group] += (a * inverse_unit).round_()
        if block.minimums is not None and block.minimum is not None:
            block.minimums[group] += (b * inverse(block.minimum[0] * form.sign)).round_()
        self.pull.addmm_(self.local[:, columns], level * a + b, alpha=-1)

    def move_halves(self) -> None:
        """Move the block's float16 numbers to where the loss is least for its levels and integers."""
        block, group = self.block, self.block.form.group
        first, second = block.level, None
        if block.scales is not None:
            first = first * block.scales.repeat_interleave(group, 0)
        if block.minimums is not None:
            second = (block.minimums * block.form.sign).repeat_interleave(group, 0)
        elif block.minimum is not None:
            second = torch.ones_like(first)
        slopes = Slopes.of(self.local, self.pull, first, second)
        a, b = slopes.best()
        if block.minimum is not None:
            b = half(block.minimum[0] + b) - block.minimum[0]
            a = slopes.best_given(b)
        a = half(block.scale[0] + a) - block.scale[0]
        better = slopes.gain(a, b) > 0
        before = block.values()
        block.scale[0] = half(block.scale[0] + a * better)
        if block.minimum is not None:
            block.minimum[0] = half(block.minimum[0] + b * better)
        self.pull.addmm_(self.local, block.values() - before, alpha=-1)


@dataclass(frozen=True, slots=True)
class Slopes:
    """By how much the loss falls when a * A + b * B is added to some columns' values.

    That is 2 (a * a1 + b * b1) - a^2 * aa - 2 a b * ab - b^2 * bb for each row; all are (rows,).
    """

    a1: torch.Tensor
    b1: torch.Tensor
    aa: torch.Tensor
    ab: torch.Tensor
    bb: torch.Tensor

    @classmethod
    def of(
        cls, local: torch.Tensor, pull: torch.Tensor, first: torch.Tensor, second: torch.Tensor | None
    ) -> "Slopes":
        """For directions A and, where given, B (columns, rows), from H and R among these columns."""
        curved = local @ first
        aa, a1 = (first * curved).sum(0), (first * pull).sum(0)
        if second is None:
            zero = torch.zeros_like(aa)
            return cls(a1, zero, aa, zero, zero)
        bb = (second * (local @ second)).sum(0)
        return cls(a1, (second * pull).sum(0), aa, (second * curved).sum(0), bb)

    def best(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The a and b that lower the loss most."""
        det = self.aa * self.bb - self.ab.square()
        usable = det > 1e-6 * self.aa * self.bb
        b = torch.where(usable, (self.aa * self.b1 - self.ab * self.a1) / det, 0.0)
        return self.best_given(b), b

    def best_given(self, b: torch.Tensor) -> torch.Tensor:
        """The best a beside a given b."""
        return (self.a1 - self.ab * b) * inverse(self.aa)

    def gain(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """By how much the loss falls."""
        linear = 2 * (a * self.a1 + b * self.b1)
        return linear - a * a * self.aa - 2 * a * b * self.ab - b * b * self.bb
