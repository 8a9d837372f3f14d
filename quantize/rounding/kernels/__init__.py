"""The innermost loops of rounding in C++ (rounding.cpp), compiled when lq is installed (hatch_build.py).

Each function here computes what the torch code that calls it would otherwise, three times faster altogether
(docs/log.md). All tensors are float32 and have contiguous rows; matrices are (columns, rows). Without the
library `are_there` says no and callers go on in torch.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from quantize.gguf_files.packing import Format
from quantize.rounding.grid import Grid, by_halves, lowest_level

MOST_COLUMNS = 32  # of a group, and of a call of `feed_back` and `move_codes`


class _Levels(ctypes.Structure):
    _fields_ = (
        ("lowest", ctypes.c_float),
        ("highest", ctypes.c_float),
        ("table", ctypes.c_void_p),
        ("n_table", ctypes.c_int32),
    )


def library_path() -> Path:
    """Where the compiled loops lie, if they were compiled."""
    return Path(__file__).parent / "librounding.so"


@functools.cache
def are_there() -> bool:
    """Whether they are, for this kind of CPU."""
    if not library_path().is_file():
        return False
    try:
        library = _library()
    except OSError:
        return False
    library.rounding_fits_cpu.restype = ctypes.c_bool
    return library.rounding_fits_cpu()


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))


def symmetric(
    form: Format, x: torch.Tensor, v: torch.Tensor, targets: Sequence[float], nearby: Sequence[float]
) -> torch.Tensor:
    """The scale (groups, rows) of each group of `x` (groups, group, rows), errors weighed by `v` (n,)."""
    groups, size, rows = x.shape
    step = torch.empty(groups, rows)
    _library().rounding_symmetric(
        _levels(form), _at(x), _at(v), _long(groups), size, _long(rows), _floats(targets), len(targets),
        _floats(nearby), len(nearby), _at(step),
    )  # fmt: skip
    return step


def affine(
    x: torch.Tensor,
    v: torch.Tensor,
    highest: int,
    *,
    negative: bool,
    cuts: Sequence[float],
    wider: Sequence[float],
    nearby: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and offset (groups, rows) for codes 0..highest."""
    groups, size, rows = x.shape
    step, offset = torch.empty(groups, rows), torch.empty(groups, rows)
    _library().rounding_affine(
        _at(x), _at(v), _long(groups), size, _long(rows), ctypes.c_float(highest), negative, _floats(cuts),
        len(cuts), _floats(wider), len(wider), _floats(nearby), len(nearby), _at(step), _at(offset),
    )  # fmt: skip
    return step, offset


def refine(grid: Grid, x: torch.Tensor, v: torch.Tensor) -> None:
    """Set the integers to the best at most one up or down, and the levels (groups, group, rows) for them."""
    form, groups, size, rows = grid.form, *x.shape
    assert grid.scales is not None
    assert form.scales is not None
    scales, level = grid.scales.clone(), torch.empty(x.shape)
    minimums = None if grid.minimums is None else grid.minimums.clone()
    allowed = form.minimums or range(1)
    limits = [ctypes.c_float(each[end]) for each in (form.scales, allowed) for end in (0, -1)]
    _library().rounding_refine(
        _levels(form), _at(x), _at(v), _long(groups), size, _long(rows), groups // len(grid.scale),
        _at(grid.scale), _at(grid.minimum), ctypes.c_float(form.sign), _at(scales), *limits[:2],
        _at(minimums), *limits[2:], _at(level),
    )  # fmt: skip
    grid.scales, grid.minimums, grid.level = scales, minimums, level


def feed_back(group: Grid, current: torch.Tensor, factor: torch.Tensor, errors: torch.Tensor) -> None:
    """Set the levels of one group, the first columns of `current` (later, rows), which is changed.

    `factor` (later, later) is U from the first of them on; `errors` (group, rows) are set.
    """
    assert len(current) <= MOST_COLUMNS, len(current)
    steps, offsets = group.steps(), group.offsets()  # kept until the call is over
    _library().rounding_feed_back(
        _levels(group.form), _at(current), len(group.level), len(current), _long(current.shape[1]),
        _rows_at(factor), _long(factor.stride(0)), _at(steps), _at(offsets),
        _at(group.level), _at(errors),
    )  # fmt: skip


def move_codes(
    form: Format, pull: torch.Tensor, local: torch.Tensor, steps: torch.Tensor, level: torch.Tensor
) -> torch.Tensor:
    """Move all of `level` (width, rows) once; returns by how much the values change.

    `local` (width, width) is H among these columns, `pull` (width, rows) R; `steps` (groups, rows).
    """
    width, rows = level.shape
    assert width <= MOST_COLUMNS, width
    moves = torch.empty(level.shape)
    _library().rounding_move_codes(
        _levels(form), _at(pull), width, form.group, _long(rows), _rows_at(local),
        _long(local.stride(0)), _at(steps), _at(level), _at(moves),
    )  # fmt: skip
    return moves


@functools.cache
def _levels(form: Format) -> "ctypes._Pointer[_Levels]":
    if form.is_uniform:
        return ctypes.pointer(_Levels(lowest_level(form), form.levels[-1], None, 0))
    lowest, table = by_halves(form)
    return ctypes.pointer(_Levels(lowest, form.levels[-1], table.data_ptr(), len(table)))


def _at(values: torch.Tensor | None) -> ctypes.c_void_p | None:
    assert values is None or values.is_contiguous(), values.stride()
    return None if values is None else _rows_at(values)


def _rows_at(values: torch.Tensor) -> ctypes.c_void_p:
    assert values.dtype == torch.float32, values.dtype
    assert values.stride(-1) == 1, values.stride()
    return ctypes.c_void_p(values.data_ptr())


def _long(value: int) -> ctypes.c_int64:
    return ctypes.c_int64(value)


@functools.cache
def _cached_floats(values: tuple[float, ...]) -> "ctypes.Array[ctypes.c_float]":
    return (ctypes.c_float * len(values))(*values)


def _floats(values: Sequence[float]) -> "ctypes.Array[ctypes.c_float]":
    return _cached_floats(tuple(values))
