"""Find weights that already sit on a quantization lattice, and pack them without loss.

A checkpoint trained for Q4_0 (QAT), or dequantized from a GGUF, holds in each block a few multiples of one
scale, rounded to the dtype that it is stored in. Rounding such weights with other scales would lose what is
there; with the right ones nothing is lost. Owns the search for those scales. A block counts only where one
scale reproduces each of its weights to within half a unit of the stored dtype's last place, so ordinary
weights do not pass: 32 of them would all have to lie on the lattice by chance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from models.tensors import to_float32
from quantize.errors import QuantizeError
from quantize.gguf_files.floats import LARGEST_FLOAT16, Dtype, from_float32
from quantize.gguf_files.packing import Blocks, Format, block_format, pack, values

#: Formats that are tried, smallest first; K-quants have too many numbers a block to be recognised.
LATTICES = ("Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
SAMPLE = 64  # blocks that are looked at first
CHUNK = 1 << 15  # blocks that are worked on at a time
NEIGHBOURS = (0, 1, -1, 2, -2, 3, -3)  # places from the least-squares scale, tried beside minimums
PATIENCE = 16  # ways of placing a block's extremes; lattices use their widest ones somewhere
NUDGES = (0.0, 0.12, -0.12, 0.24, -0.24)
FITS = 3  # codes and least-squares scales in turn, for an extreme that storing has rounded

Room = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Lattice:
    """Weights packed on the lattice that they were found on: llama.cpp's bytes (rows, row_bytes).

    `is_exact`: dequantized and stored as before, every weight is the same. Otherwise the lattice's scales are
    no float16 numbers, and `largest_error` is the largest difference, in units of the block's scale.
    """

    type: str
    data: np.ndarray
    is_exact: bool
    largest_error: float


def find_lattice(weights: np.ndarray, *, stored: Dtype, types: tuple[str, ...] = LATTICES) -> Lattice | None:
    """The smallest lattice of `types` that (rows, n) float32 weights, read from dtype `stored`, lie on.

    None where some block lies on none, which is the case for all ordinary weights.
    """
    if weights.ndim != 2 or not weights.size:
        raise QuantizeError(f"weights of shape {weights.shape} are not rows; give (rows, n)")
    if not np.isfinite(weights).all():
        raise QuantizeError("weights hold NaN or infinity; check the checkpoint")
    for name in types:
        form = block_format(name)
        if weights.shape[1] % form.block:
            continue
        x = weights.reshape(-1, form.block)
        sample = x[:: max(1, len(x) // SAMPLE)]
        if _fit(form, sample, stored, patience=PATIENCE) is not None and (found := _fit_all(form, x, stored)):
            return _packed(form, weights, found, stored)
    return None


def _fit_all(form: Format, x: np.ndarray, stored: Dtype) -> Blocks | None:
    """`_fit`, a chunk at a time."""
    parts = []
    for start in range(0, len(x), CHUNK):
        part = _fit(form, x[start : start + CHUNK], stored)
        if part is None:
            return None
        parts.append(part)
    minimums = [part.minimum for part in parts if part.minimum is not None]
    return Blocks(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(minimums) if minimums else None,
    )


def _packed(form: Format, weights: np.ndarray, found: Blocks, stored: Dtype) -> Lattice:
    rows = len(weights)
    blocks = Blocks(
        found.codes.reshape(rows, -1),
        found.scale.reshape(rows, -1),
        None if found.minimum is None else found.minimum.reshape(rows, -1),
    )
    made = values(form, blocks)
    same = to_float32(from_float32(made, stored)) == weights
    step = np.repeat(np.abs(blocks.scale.astype(np.float32)), form.block, 1)
    error = np.abs(made - weights) / np.where(step > 0, step, 1)
    return Lattice(form.name, pack(form, blocks), bool(same.all()), float(error.max()))


def _fit(form: Format, x: np.ndarray, stored: Dtype, *, patience: int | None = None) -> Blocks | None:
    """Blocks (blocks, 32) of weights as codes, scales and minimums, or None where one does not fit.

    `patience`: so many ways that fit no block at all are enough.
    """
    x = x.astype(np.float64)
    room = rounding_room(x, stored)
    codes = np.zeros(x.shape, np.uint8)
    scale, minimum = np.zeros(len(x), np.float16), np.zeros(len(x), np.float16)
    left = np.arange(len(x))
    tries = _affine_tries(form) if form.has_minimum else _symmetric_tries(form)
    for tried, attempt in enumerate(tries):
        if not left.size or (tried == patience and left.size == len(x)):
            break
        fit = attempt(x[left], (room[0][left], room[1][left]))
        done = left[fit.fits]
        codes[done], scale[done], minimum[done] = (
            part[fit.fits] for part in (fit.codes, fit.scale, fit.minimum)
        )
        left = left[~fit.fits]
    if left.size:
        return None
    return Blocks(codes, scale, minimum if form.has_minimum else None)


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Which blocks one way of placing the extremes reproduces, and with what."""

    fits: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray


def _symmetric_tries(form: Format) -> Iterator:
    """Each level in turn as that of the block's largest weight, the furthest first.

    Of many levels, a rounded extreme may be a quarter of a step off, and the next ones' codes with it.
    """
    many = len(form.levels) > 64
    levels = range(1, 128) if many else [level for level in form.levels if level]
    for level in sorted(levels, key=abs, reverse=True):
        for nudge in NUDGES if many else (0.0,):
            yield lambda x, room, target=level + nudge: _symmetric(form, x, room, target)


def _symmetric(form: Format, x: np.ndarray, room: Room, target: float) -> _Attempt:
    """Blocks whose largest weight is `target` times the scale."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)
    codes, level = _on_levels(form, x * (target * _quotient(1, extreme)))
    for _ in range(FITS - 1):
        inverse_step = _quotient((level**2).sum(1, keepdims=True), (level * x).sum(1, keepdims=True))
        codes, level = _on_levels(form, x * inverse_step)
    # A scale reproduces x where level * scale is in the room about x: the intervals must have one in common.
    used = level != 0
    size = np.where(used, np.abs(level), 1)
    middle = x * np.sign(level)
    below, above = (np.where(level < 0, b, a) for a, b in (room, room[::-1]))
    low = np.where(used, (middle - below) / size, -np.inf).max(1)
    high = np.where(used, (middle + above) / size, np.inf).min(1)
    zeros = ~used.any(1)
    low, high = np.where(zeros, 0, low), np.where(zeros, 0, high)
    fits = (low <= high) & (used | (x == 0)).all(1)
    scale = _to_half((low + high) / 2)
    return _Attempt(fits, codes, scale, np.zeros_like(scale))


def _affine_tries(form: Format) -> Iterator:
    """Each pair of codes in turn as those of the smallest and the largest weight, the widest first."""
    highest = len(form.levels) - 1
    for span in range(highest, 0, -1):
        for first in range(highest - span + 1):
            yield lambda x, room, span=span, first=first: _affine(x, room, span, first)


def _affine(x: np.ndarray, room: Room, span: int, first: int) -> _Attempt:
    """Blocks whose smallest weight has code `first` and whose largest has `first + span`."""
    low, width = x.min(1, keepdims=True), np.ptp(x, 1, keepdims=True)
    code = np.rint((x - low) * _quotient(span, width)) + first
    centred = code - code.mean(1, keepdims=True)
    step = _quotient((centred * x).sum(1), (centred**2).sum(1))
    fits, scale, minimum = (np.zeros(len(x), kind) for kind in (bool, np.float16, np.float16))
    loose = _in_common(x, room, code, step)
    if not (loose[0] - loose[1] <= 2 * room[0].max(1)).any():
        return _Attempt(fits, code.astype(np.uint8), scale, minimum)
    for neighbour in NEIGHBOURS:
        tried = _neighbour(_to_half(step), neighbour)
        bottom, top = _in_common(x, room, code, tried.astype(np.float64))
        stored = _to_half((bottom + top) / 2)
        good = ~fits & (bottom <= stored) & (stored <= top)
        fits |= good
        scale, minimum = np.where(good, tried, scale), np.where(good, stored, minimum)
    relaxed = ~fits & (loose[0] <= loose[1])
    scale = np.where(relaxed, _to_half(step), scale)
    minimum = np.where(relaxed, _to_half((loose[0] + loose[1]) / 2), minimum)
    return _Attempt(fits | relaxed, code.astype(np.uint8), scale, minimum)


def _in_common(
    x: np.ndarray, room: Room, code: np.ndarray, step: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest minimum with which `step` reproduces each block; crossed where none does."""
    rest = x - code * step[:, None]
    return (rest - room[0]).max(1), (rest + room[1]).min(1)


def _on_levels(form: Format, scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes of the nearest levels, and these; Q8_0's -128 is left out, as ggml leaves it out."""
    codes = np.searchsorted(form.midpoints, scaled).astype(np.uint8)
    if len(form.levels) > 64:
        codes = np.maximum(codes, 1)
    return codes, np.array(form.levels, np.float64)[codes]


def rounding_room(x: np.ndarray, stored: Dtype) -> tuple[np.ndarray, np.ndarray]:
    """How far below and above each value the numbers lie that `stored` rounds to it, half a unit mostly.

    Ties go to even last places, so for odd ones the ends themselves do not belong; a power of two has only
    half the room on the side of zero.
    """
    bits, lowest = {"F32": (24, -126), "F16": (11, -14), "BF16": (8, -126)}[stored]
    mantissa, exponent = np.frexp(x)  # |x| < 2^exponent
    unit = np.ldexp(1.0, np.maximum(exponent, lowest + 1) - bits)
    room = np.where(np.rint(x / unit) % 2 == 0, 0.5, 0.5 - 2.0**-20) * unit
    towards_zero = np.where((np.abs(mantissa) == 0.5) & (exponent > lowest + 1), room / 2, room)
    return np.where(x > 0, towards_zero, room), np.where(x < 0, towards_zero, room)


def _to_half(x: np.ndarray) -> np.ndarray:
    return np.clip(x, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16)


def _neighbour(x: np.ndarray, away: int) -> np.ndarray:
    """The float16 number so many places above or below."""
    for _ in range(abs(away)):
        x = np.nextafter(x, np.float16(np.copysign(LARGEST_FLOAT16, away)))
    return x


def _quotient(above: np.ndarray | int, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where below is 0."""
    return np.where(below != 0, above / np.where(below != 0, below, 1), 0.0)
