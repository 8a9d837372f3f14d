"""Choose a block's scales for given weights: a search weighted by how much each column's error counts.

Candidates between the extremes, each followed by the least-squares scale for the codes it gives, then more
about the best. What is stored decides in the end: the float16 scale is tried one place up and down; K-quants'
integers one up and down, and their float16 numbers refitted to what they multiply.
"""

from itertools import product

import torch

from quantize.gguf_files.packing import Format
from quantize.rounding import kernels
from quantize.rounding.grid import Grid, half, inverse, nearest

NEARBY = (1.0, 0.985, 1.015, 1.0)  # about the best scale found: codes for it, and the scale for these
WIDER = (1.0, 1.15, 1.3, 1.5)  # than the range of what matters
ROUNDS = 3  # integer scales and their float16 numbers in turn


def search(form: Format, weights: torch.Tensor, importance: torch.Tensor, *, quick: bool = False) -> Grid:
    """The numbers of whole blocks for (n, rows) weights; `importance` (n,) weighs squared errors.

    `quick`: fewer candidates, for a block whose better numbers are known and kept.
    """
    x = weights.view(-1, form.group, weights.shape[1])
    v = importance.contiguous().view(-1, form.group, 1)
    if form.has_minimum:
        step, offset = affine(x, v, len(form.levels) - 1, negative=form.minimums is not None, quick=quick)
    else:
        step, offset = symmetric(form, x, v, quick=quick), None
    if form.scales is None:
        return _with_float16(form, x, v, step, offset)
    return _with_integers(form, x, v, step, offset)


def symmetric(form: Format, x: torch.Tensor, v: torch.Tensor, *, quick: bool) -> torch.Tensor:
    """The scale of each group without offset, (groups, rows), for x (groups, group, rows)."""
    if kernels.are_there():
        return kernels.symmetric(form, x, v, targets(form, quick=quick), NEARBY)
    at = x.abs().argmax(1, keepdim=True)
    inverse_extreme = inverse(x.gather(1, at))
    vx = v * x
    best = torch.zeros_like(inverse_extreme)
    step = torch.zeros_like(best)

    def consider(inverse_step: torch.Tensor) -> None:
        nonlocal best, step
        level = nearest(form, x * inverse_step)
        xl = (vx * level).sum(1, keepdim=True)
        ll = (level.square_() * v).sum(1, keepdim=True)
        fitted = xl * inverse(ll)
        gain = xl * fitted
        better = gain > best
        best, step = torch.where(better, gain, best), torch.where(better, fitted, step)

    for target in targets(form, quick=quick):
        consider(inverse_extreme * target)
    for factor in NEARBY:
        consider(inverse(step) * factor)
    return step[:, 0]


def targets(form: Format, *, quick: bool) -> list[float]:
    """The levels, whole or not, that a group's largest weight is tried on."""
    low, high = float(max(form.levels[0], -127)), float(form.levels[-1])
    n_levels = len(form.levels)
    if n_levels > 64:
        first, last, sides = 0.97, 1.005, (low,)
    elif n_levels > 32:
        first, last, sides = 0.8, 1.1, (low, high)
    else:
        first, last, sides = 0.45 if n_levels < 16 else 0.65, 1.55, (low, high)
    tries = 12 if quick else 32
    return [side * (first + (last - first) / (tries - 1) * i) for side in sides for i in range(tries)]


def affine(
    x: torch.Tensor, v: torch.Tensor, highest: int, *, negative: bool, quick: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset of each group for codes 0..highest, (groups, rows) each.

    `negative`: the offset may not be above 0.
    """
    cuts = shrinkings(highest, quick=quick)
    if kernels.are_there():
        return kernels.affine(x, v, highest, negative=negative, cuts=cuts, wider=WIDER, nearby=NEARBY)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if negative:
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    vx = v * x
    sums = v.sum(1, keepdim=True), vx.sum(1, keepdim=True)
    best = torch.full_like(low, -1.0)
    step, offset = torch.zeros_like(low), torch.zeros_like(low)

    def consider(inverse_step: torch.Tensor, start: torch.Tensor) -> None:
        nonlocal best, step, offset
        code = ((x - start) * inverse_step).round_().clamp_(0, highest)
        fitted, shift, gain = _line(code, vx, v, *sums, negative=negative)
        better = gain > best
        best = torch.where(better, gain, best)
        step, offset = torch.where(better, fitted, step), torch.where(better, shift, offset)

    for below, above in product(cuts, cuts):
        consider(highest * inverse(span * (1 - below - above)), low + span * below)
    # Where what is furthest out matters least: the range of what matters, about the weighted mean.
    mean = sums[1] * inverse(sums[0])
    drawn_in = (x - mean) * (v * inverse(v.amax(1, keepdim=True))).sqrt()
    low, high = drawn_in.amin(1, keepdim=True) + mean, drawn_in.amax(1, keepdim=True) + mean
    for wider in WIDER:
        middle, reach = (low + high) / 2, (high - low) / 2 * wider
        consider(highest / 2 * inverse(reach), middle - reach)
    for factor in NEARBY:
        consider(inverse(step) * factor, offset)
    return step[:, 0], offset[:, 0]


def shrinkings(highest: int, *, quick: bool) -> list[float]:
    """By how much of its span a group's range is cut below, and above."""
    first, last, tries = {3: (-0.1, 0.3, 8), 15: (-0.08, 0.28, 11), 31: (-0.06, 0.24, 14)}[highest]
    if quick:
        tries = 4
    return [first + (last - first) / (tries - 1) * i for i in range(tries)]


def _line(code, vx, v, v_sum, vx_sum, *, negative: bool):
    """Least-squares step and offset for given codes, and how much squared error they take away."""
    vc = v * code
    c, cc, xc = vc.sum(1, keepdim=True), (vc * code).sum(1, keepdim=True), (vx * code).sum(1, keepdim=True)
    det = v_sum * cc - c * c
    usable = det > 1e-6 * v_sum * cc
    turned = torch.where(usable, 1 / det, 0.0)
    step = (v_sum * xc - c * vx_sum) * turned
    offset = torch.where(usable, (cc * vx_sum - c * xc) * turned, vx_sum * inverse(v_sum))
    if negative:
        above = offset > 0
        step = torch.where(above, xc * inverse(cc), step)
        offset = torch.where(above, 0.0, offset)
    # The error of a constrained least-squares fit is sum v x^2 less this.
    return step, offset, step * xc + offset * vx_sum


def _with_float16(
    form: Format, x: torch.Tensor, v: torch.Tensor, step: torch.Tensor, offset: torch.Tensor | None
) -> Grid:
    """Blocks of one group: the float16 scale about `step` that is best once everything is rounded."""
    rounded, least = half(step), torch.full_like(step, torch.inf)
    best, best_shift, best_level = rounded, offset, x
    for away in (0, 1, -1):
        scale = _neighbour(rounded, away)
        wide, inverse_wide = scale[:, None], inverse(scale)[:, None]
        shift, moved = None, x
        if offset is not None:
            level = nearest(form, (x - offset[:, None]) * inverse_wide)
            shift = half(((x - level * wide) * v).sum(1) * inverse(v.sum(1)))
            moved = x - shift[:, None]
        level = nearest(form, moved * inverse_wide)
        error = ((moved - level * wide).square_() * v).sum(1)
        better = error < least
        least, best = torch.where(better, error, least), torch.where(better, scale, best)
        best_level = torch.where(better[:, None], level, best_level)
        if shift is not None and best_shift is not None:
            best_shift = torch.where(better, shift, best_shift)
    return Grid(form, best_level.view(-1, x.shape[2]), best, best_shift)


def _neighbour(values: torch.Tensor, away: int) -> torch.Tensor:
    """The float16 number so many places further from 0 than each; itself where there is none."""
    moved = (values.to(torch.float16).view(torch.int16) + away).view(torch.float16).to(torch.float32)
    return torch.where((values != 0) & moved.isfinite(), moved, values)


def _with_integers(form: Format, x, v, step: torch.Tensor, offset: torch.Tensor | None) -> Grid:
    """K-quants: integer scales of float16 numbers, tried and refitted in turn."""
    assert form.scales is not None
    scale, scales = _integers(form, step, form.scales)
    minimum = minimums = None
    if offset is not None and form.minimums is not None:
        minimum, minimums = _integers(form, -offset, form.minimums)
    grid = Grid(form, x, scale, minimum, scales, minimums)
    for turn in range(ROUNDS):
        if turn:
            refit_halves(grid, x, v)
        refine_integers(grid, x, v)
    grid.level = grid.level.view(-1, x.shape[2])
    return grid


def _integers(form: Format, wanted: torch.Tensor, allowed: range) -> tuple[torch.Tensor, torch.Tensor]:
    """A float16 number per block and an integer per group, their products near `wanted` (groups, rows).

    The largest in magnitude gets the integer furthest from 0.
    """
    groups, rows = form.block // form.group, wanted.shape[1]
    blocks = wanted.view(-1, groups, rows)
    extreme = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))[:, 0]
    furthest = allowed[0] if allowed[0] < 0 else allowed[-1]
    unit = half(extreme / furthest)
    wide = unit.repeat_interleave(groups, 0)
    return unit, (wanted * inverse(wide)).round_().clamp_(allowed[0], allowed[-1])


def refine_integers(grid: Grid, x: torch.Tensor, v: torch.Tensor) -> None:
    """Try each group's integers one up and down, and set them and the levels (groups, group, rows)."""
    if kernels.are_there():
        kernels.refine(grid, x, v)
        return
    form = grid.form
    assert grid.scales is not None
    assert form.scales is not None
    scales, minimums, moved = grid.scales, grid.minimums, x
    least = torch.full_like(scales, torch.inf)
    best, best_minimum, best_level = scales, minimums, x
    unit = grid.by_group(grid.scale)
    for below in (0, -1, 1) if minimums is not None else (0,):
        tried = minimums
        if minimums is not None and form.minimums is not None and grid.minimum is not None:
            tried = (minimums + below).clamp_(form.minimums[0], form.minimums[-1])
            moved = x - (grid.by_group(grid.minimum) * tried * form.sign)[:, None]
        for up in (0, -1, 1):
            integer = (scales + up).clamp_(form.scales[0], form.scales[-1])
            step = (unit * integer)[:, None]
            level = nearest(form, moved * inverse(step))
            error = ((moved - level * step).square_() * v).sum(1)
            better = error < least
            least, best = torch.where(better, error, least), torch.where(better, integer, best)
            best_level = torch.where(better[:, None], level, best_level)
            if tried is not None and best_minimum is not None:
                best_minimum = torch.where(better, tried, best_minimum)
    grid.scales, grid.minimums, grid.level = best, best_minimum, best_level


def refit_halves(grid: Grid, x: torch.Tensor, v: torch.Tensor) -> None:
    """Set the float16 numbers to their least-squares optimum for the integers and levels as they are."""
    assert grid.scales is not None
    groups, rows = grid.form.block // grid.form.group, x.shape[2]

    def total(values: torch.Tensor) -> torch.Tensor:
        return values.view(-1, groups, rows).sum(1)

    vl = v * grid.level
    xa = total((vl * x).sum(1) * grid.scales)
    aa = total((vl * grid.level).sum(1) * grid.scales.square())
    alone = torch.where(aa > 0, xa * inverse(aa), grid.scale)
    if grid.minimums is None or grid.minimum is None:
        grid.scale = half(alone)
        return
    xb = total((v * x).sum(1) * grid.minimums)
    ab = total(vl.sum(1) * grid.scales * grid.minimums)
    bb = total(v.sum(1) * grid.minimums.square())
    det = aa * bb - ab.square()
    usable = det > 1e-6 * aa * bb
    minimum = torch.where(usable, (ab * xa - aa * xb) / det, grid.minimum)
    below = minimum < 0
    grid.minimum = half(torch.where(below, 0.0, minimum))
    # With the minimum as stored, the scale that suits it.
    grid.scale = half(torch.where(aa > 0, (xa + grid.minimum * ab) * inverse(aa), grid.scale))
