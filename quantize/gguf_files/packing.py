"""The arrays that a quantized block consists of, to llama.cpp's bytes and back.

Owns the layouts of the twelve formats that `quantize.rounding` writes. A weight of group g in block b is

    scale[b] * scales[g] * level[code]  +/-  minimum[b] * minimums[g]

with float16 `scale` and `minimum`, small integers `scales` and `minimums` (both 1 in formats that have none),
and the sign of the minimum minus in K-quants. Knows nothing of how the numbers are chosen. Layouts:
block_* in ggml-common.h and dequantize_row_* in ggml-quants.c.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from quantize.errors import QuantizeError
from quantize.gguf_files.tensor_types import row_bytes, tensor_type

IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The numbers in a matrix of (rows, n) weights; what a format lacks is None.

    `codes` (rows, n) uint8 count from the lowest level; `scale`, `minimum` (rows, n / block) float16;
    `scales`, `minimums` (rows, n / group) int16, signed where the format's are.
    """

    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None = None
    scales: np.ndarray | None = None
    minimums: np.ndarray | None = None


@dataclass(frozen=True)
class Format:
    """What values a block can hold. `levels` are what codes 0, 1, ... stand for, ascending."""

    name: str
    block: int
    group: int
    levels: tuple[int, ...]
    has_minimum: bool = False
    scales: range | None = None
    minimums: range | None = None

    @property
    def sign(self) -> int:
        """What the minimum is multiplied with: K-quants take it away."""
        return -1 if self.minimums else 1

    @property
    def is_uniform(self) -> bool:
        """Whether the levels are consecutive integers."""
        return self.levels[-1] - self.levels[0] == len(self.levels) - 1

    @cached_property
    def midpoints(self) -> np.ndarray:
        """Where the nearest level changes, (n_levels - 1,) float32."""
        levels = np.array(self.levels, np.float32)
        return (levels[1:] + levels[:-1]) / 2


def _simple(name: str, levels: Sequence[int], *, has_minimum: bool = False) -> Format:
    return Format(name, 32, 32, tuple(levels), has_minimum)


def _super(
    name: str, group: int, levels: Sequence[int], scales: range, minimums: range | None = None
) -> Format:
    return Format(name, 256, group, tuple(levels), minimums is not None, scales, minimums)


FORMATS: Mapping[str, Format] = {
    one.name: one
    for one in (
        _simple("Q4_0", range(-8, 8)),
        _simple("Q4_1", range(16), has_minimum=True),
        _simple("Q5_0", range(-16, 16)),
        _simple("Q5_1", range(32), has_minimum=True),
        _simple("Q8_0", range(-128, 128)),
        _simple("IQ4_NL", IQ4_NL_LEVELS),
        _super("IQ4_XS", 32, IQ4_NL_LEVELS, range(-32, 32)),
        _super("Q2_K", 16, range(4), range(16), range(16)),
        _super("Q3_K", 16, range(-4, 4), range(-32, 32)),
        _super("Q4_K", 32, range(16), range(64), range(64)),
        _super("Q5_K", 32, range(32), range(64), range(64)),
        _super("Q6_K", 16, range(-32, 32), range(-128, 128)),
    )
}


def block_format(name: str) -> Format:
    """The format called `name`; raises for those that are not described here."""
    if name not in FORMATS:
        raise QuantizeError(f"{name!r} is not a format that can be packed here; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def values(form: Format, blocks: Blocks) -> np.ndarray:
    """The (rows, n) float32 weights that `blocks` stand for, bit for bit those of ggml's dequantizer."""
    groups = form.block // form.group
    scale = np.repeat(blocks.scale.astype(np.float32), groups, 1)
    if blocks.scales is not None:
        scale = scale * blocks.scales
    out = np.array(form.levels, np.float32)[blocks.codes]
    out *= np.repeat(scale, form.group, 1)
    if blocks.minimum is not None:
        minimum = np.repeat(blocks.minimum.astype(np.float32), groups, 1) * np.float32(form.sign)
        if blocks.minimums is not None:
            minimum = minimum * blocks.minimums
        out += np.repeat(minimum, form.group, 1)
    return out


def pack(form: Format, blocks: Blocks) -> np.ndarray:
    """The (rows, row_bytes) uint8 data of `blocks`."""
    rows, n = blocks.codes.shape
    kind = tensor_type(form.name)
    out = np.empty((rows, n // form.block, kind.block_bytes), np.uint8)
    if n != out.shape[1] * form.block:
        row_bytes(kind, n)  # says what does not fit
    split = Blocks(
        blocks.codes.reshape(rows, -1, form.block),
        blocks.scale,
        blocks.minimum,
        None if blocks.scales is None else blocks.scales.reshape(rows, -1, form.block // form.group),
        None if blocks.minimums is None else blocks.minimums.reshape(rows, -1, form.block // form.group),
    )
    at = 0
    for part in PARTS[form.name]:
        out[..., at : at + part.width] = part.pack(split)
        at += part.width
    return out.reshape(rows, -1)


def unpack(form: Format, data: np.ndarray) -> Blocks:
    """The numbers in (rows, row_bytes) uint8 data."""
    kind = tensor_type(form.name)
    if data.dtype != np.uint8 or data.ndim != 2 or not data.shape[1] or data.shape[1] % kind.block_bytes:
        raise QuantizeError(
            f"{form.name} rows are whole blocks of {kind.block_bytes} bytes, not {data.shape} {data.dtype}"
        )
    split = data.reshape(len(data), -1, kind.block_bytes)
    pieces: dict[str, np.ndarray] = {}
    at = 0
    for part in PARTS[form.name]:
        part.unpack(split[..., at : at + part.width], pieces)
        at += part.width
    return _joined(pieces, len(data))


def _joined(pieces: dict[str, np.ndarray], rows: int) -> Blocks:
    """Blocks of whole rows from what the parts found in each block."""
    flat = {name: piece.reshape(rows, -1) for name, piece in pieces.items()}
    return Blocks(
        flat["codes"].astype(np.uint8),
        flat["scale"],
        flat.get("minimum"),
        flat["scales"].astype(np.int16) if "scales" in flat else None,
        flat["minimums"].astype(np.int16) if "minimums" in flat else None,
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Some bytes of a block. `pack` makes (rows, blocks, width) uint8 from Blocks whose codes are (rows,
    blocks, block) and whose group arrays are (rows, blocks, groups); `unpack` adds the same to a dictionary.
    """

    width: int
    pack: Callable[[Blocks], np.ndarray]
    unpack: Callable[[np.ndarray, dict[str, np.ndarray]], None]


def _half(name: str) -> Part:
    """A float16."""

    def pack(blocks: Blocks) -> np.ndarray:
        return np.ascontiguousarray(getattr(blocks, name), np.float16)[..., None].view(np.uint8)

    def unpack(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
        pieces[name] = np.ascontiguousarray(data).view(np.float16)[..., 0]

    return Part(2, pack, unpack)


def _bits(block: int, span: int, width: int, first: int = 0) -> Part:
    """`width` bits of each of a block's codes, from bit `first` up. In every `span` codes the lowest bits of
    the bytes hold the first codes, the next bits the following ones, and so on.
    """
    each = 8 // width
    stride, mask = span // each, (1 << width) - 1

    def pack(blocks: Blocks) -> np.ndarray:
        rows, n_blocks, _ = blocks.codes.shape
        fields = ((blocks.codes >> first) & mask).reshape(rows, n_blocks, -1, each, stride)
        out = fields[..., 0, :].copy()
        for i in range(1, each):
            out |= fields[..., i, :] << (i * width)
        return out.reshape(rows, n_blocks, -1)

    def unpack(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
        rows, n_blocks, _ = data.shape
        shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
        fields = (data.reshape(rows, n_blocks, -1, 1, stride) >> shifts) & mask
        fields = fields.reshape(rows, n_blocks, -1) << first
        pieces["codes"] = pieces["codes"] | fields if "codes" in pieces else fields

    return Part(block * width // 8, pack, unpack)


def _pack_bytes(blocks: Blocks) -> np.ndarray:
    return blocks.codes ^ 0x80


def _unpack_bytes(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
    pieces["codes"] = data ^ 0x80


def _pack_signed(blocks: Blocks) -> np.ndarray:
    return _present(blocks.scales).astype(np.int8).view(np.uint8)


def _unpack_signed(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
    pieces["scales"] = np.ascontiguousarray(data).view(np.int8)


def _pack_nibbles(blocks: Blocks) -> np.ndarray:
    return (_present(blocks.scales) | (_present(blocks.minimums) << 4)).astype(np.uint8)


def _unpack_nibbles(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
    pieces["scales"], pieces["minimums"] = data & 15, data >> 4


def _pack_sixes(blocks: Blocks) -> np.ndarray:
    """Eight scales and eight minimums of 6 bits: the first four of each whole, the others' lowest 4 bits
    side by side, their highest 2 on top of the first.
    """
    scales, minimums = _present(blocks.scales), _present(blocks.minimums)
    parts = (
        scales[..., :4] | (scales[..., 4:] >> 4 << 6),
        minimums[..., :4] | (minimums[..., 4:] >> 4 << 6),
        (scales[..., 4:] & 15) | ((minimums[..., 4:] & 15) << 4),
    )
    return np.concatenate(parts, -1).astype(np.uint8)


def _unpack_sixes(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
    first, second, low = data[..., :4], data[..., 4:8], data[..., 8:]
    pieces["scales"] = np.concatenate((first & 63, (low & 15) | (first >> 6 << 4)), -1)
    pieces["minimums"] = np.concatenate((second & 63, (low >> 4) | (second >> 6 << 4)), -1)


def _pack_split_sixes(blocks: Blocks) -> np.ndarray:
    """Sixteen scales of 6 bits, stored plus 32: lowest 4 bits in 8 bytes, highest 2 bits in the next 4."""
    stored = (_present(blocks.scales) + 32).astype(np.uint8)
    low = (stored[..., :8] & 15) | ((stored[..., 8:] & 15) << 4)
    high = np.zeros((*stored.shape[:2], 4), np.uint8)
    for i in range(4):
        high |= stored[..., 4 * i : 4 * i + 4] >> 4 << (2 * i)
    return np.concatenate((low, high), -1)


def _unpack_split_sixes(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
    low = np.concatenate((data[..., :8] & 15, data[..., :8] >> 4), -1)
    high = np.concatenate([(data[..., 8:] >> (2 * i) & 3) << 4 for i in range(4)], -1)
    pieces["scales"] = (low | high).astype(np.int16) - 32


def _pack_low_and_high(blocks: Blocks) -> np.ndarray:
    """Eight scales of 6 bits, stored plus 32: highest 2 bits in 2 bytes, lowest 4 bits side by side in 4."""
    stored = (_present(blocks.scales) + 32).astype(np.uint16)
    high = np.zeros(stored.shape[:2], "<u2")
    for i in range(8):
        high |= stored[..., i] >> 4 << (2 * i)
    low = (stored[..., 0::2] & 15) | ((stored[..., 1::2] & 15) << 4)
    return np.concatenate((high[..., None].view(np.uint8), low.astype(np.uint8)), -1)


def _unpack_low_and_high(data: np.ndarray, pieces: dict[str, np.ndarray]) -> None:
    high = np.ascontiguousarray(data[..., :2]).view("<u2") >> (2 * np.arange(8, dtype=np.uint16)) & 3
    low = np.stack((data[..., 2:] & 15, data[..., 2:] >> 4), -1).reshape(high.shape)
    pieces["scales"] = (low | high << 4).astype(np.int16) - 32


def _present(values: np.ndarray | None) -> np.ndarray:
    if values is None:
        raise QuantizeError("this format's blocks have integer scales (and minimums), and none are given")
    return values


_NIBBLES = _bits(32, 32, 4)
_FIFTH_BITS = _bits(32, 8, 1, 4)
_SIXES = Part(12, _pack_sixes, _unpack_sixes)

#: What lies in a block, in order.
PARTS: Mapping[str, tuple[Part, ...]] = {
    "Q4_0": (_half("scale"), _NIBBLES),
    "Q4_1": (_half("scale"), _half("minimum"), _NIBBLES),
    "Q5_0": (_half("scale"), _FIFTH_BITS, _NIBBLES),
    "Q5_1": (_half("scale"), _half("minimum"), _FIFTH_BITS, _NIBBLES),
    "Q8_0": (_half("scale"), Part(32, _pack_bytes, _unpack_bytes)),
    "IQ4_NL": (_half("scale"), _NIBBLES),
    "IQ4_XS": (_half("scale"), Part(6, _pack_low_and_high, _unpack_low_and_high), _bits(256, 32, 4)),
    "Q2_K": (
        Part(16, _pack_nibbles, _unpack_nibbles), _bits(256, 128, 2), _half("scale"), _half("minimum"),
    ),
    "Q3_K": (
        _bits(256, 256, 1, 2), _bits(256, 128, 2), Part(12, _pack_split_sixes, _unpack_split_sixes),
        _half("scale"),
    ),
    "Q4_K": (_half("scale"), _half("minimum"), _SIXES, _bits(256, 64, 4)),
    "Q5_K": (_half("scale"), _half("minimum"), _SIXES, _bits(256, 256, 1, 4), _bits(256, 64, 4)),
    "Q6_K": (
        _bits(256, 128, 4), _bits(256, 128, 2, 4), Part(16, _pack_signed, _unpack_signed), _half("scale"),
    ),
}  # fmt: skip
