"""Round a weight matrix into one of llama.cpp's formats with less loss than rounding to nearest.

For y = W x and H = E[x x^T], rounding W to Q costs trace((W - Q) H (W - Q)^T). Owns the order of the steps,
each of which can be left out: a search of the scales, error feedback, coordinate descent; and the guard: a
row keeps ggml's own rounding (with importance) wherever that has the lower loss, so none is ever worse. Works
on blocks of rows, in memory that does not grow with them, and gives the same bytes for the same input.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from quantize.gguf_files.packing import Blocks, Format, block_format, pack, unpack, values
from quantize.gguf_files.tensor_types import checked_importance
from quantize.gguf_files.types import quantize_rows
from quantize.rounding.curvature import BadHessian, Curvature, prepare
from quantize.rounding.descent import descend
from quantize.rounding.feedback import feed_back
from quantize.rounding.grid import Grid, from_blocks, to_blocks
from quantize.rounding.scales import search

ROW_BLOCK_WEIGHTS = 1 << 20  # weights that are worked on at a time
FEWEST_ROWS, MOST_ROWS = 512, 2048


@dataclass(frozen=True, slots=True)
class Steps:
    """Which steps are taken. Feedback and descent need a Hessian and are left out without one.

    `search`: scales are searched for, instead of taken from ggml's rounding. `feedback`: columns make up for
    the errors of earlier ones. `conditional`: scales then weigh what feedback leaves of an error's cost.
    `descent`: at most so many passes over all codes and scales, and with `blocks` over whole blocks.
    """

    search: bool = True
    feedback: bool = True
    conditional: bool = True
    descent: int = 6
    blocks: bool = True


@dataclass(frozen=True, slots=True)
class Rounded:
    """A rounded matrix: llama.cpp's bytes (rows, row_bytes), the float32 values (rows, n) they stand for, and
    its loss by row, float64, beside that of ggml's rounding to nearest. `kept` (rows,): which are ggml's.
    """

    data: np.ndarray
    values: np.ndarray
    row_loss: np.ndarray
    baseline_row_loss: np.ndarray
    kept: np.ndarray
    method: str

    @property
    def loss(self) -> float:
        """trace(D H D^T) of what was made."""
        return float(self.row_loss.sum())

    @property
    def baseline_loss(self) -> float:
        """The same of ggml's rounding to nearest."""
        return float(self.baseline_row_loss.sum())


def round_matrix(
    weights: np.ndarray,
    type_name: str,
    *,
    hessian: np.ndarray | Curvature | None = None,
    n_tokens: int | None = None,
    importance: np.ndarray | None = None,
    steps: Steps | None = None,
) -> Rounded:
    """Round (rows, n) float32 weights.

    `hessian` (n, n): E[x x^T] of `n_tokens` activations, or what `curvature.prepare` made of it, which is
    worth keeping for the matrices and types that share it. `importance` (n,): E[x^2], for ggml's rounding
    and, without a Hessian, as its diagonal. With neither, all columns count alike.
    """
    form, steps = block_format(type_name), steps or Steps()
    weights = np.asarray(weights, np.float32)
    n = weights.shape[-1]
    curvature = prepare(hessian, n_tokens=n_tokens) if isinstance(hessian, np.ndarray) else hessian
    if curvature is not None and curvature.n != n:
        raise BadHessian(f"a Hessian of {curvature.n} columns does not belong to rows of {n} weights")
    if importance is None and curvature is not None:
        importance = curvature.plain.diagonal().numpy()
    weighing = np.ones(n, np.float32) if importance is None else checked_importance(importance, n)
    baseline = quantize_rows(type_name, weights, None if importance is None else weighing)
    data, rounded = np.empty_like(baseline), np.empty(weights.shape, np.float32)
    losses, kept = np.empty((2, len(weights))), np.empty(len(weights), bool)
    for rows in _row_blocks(*weights.shape):
        part = torch.from_numpy(weights[rows].T.copy())
        start = unpack(form, baseline[rows])
        grid = _sought(
            form, part, start, curvature=curvature, importance=torch.from_numpy(weighing), steps=steps
        )
        blocks = to_blocks(grid)
        ours, theirs = values(form, blocks), values(form, start)
        losses[0, rows] = _loss(weights[rows] - ours, curvature, weighing)
        losses[1, rows] = _loss(weights[rows] - theirs, curvature, weighing)
        keep = kept[rows] = ~(losses[0, rows] < losses[1, rows])
        data[rows] = np.where(keep[:, None], baseline[rows], pack(form, blocks))
        rounded[rows] = np.where(keep[:, None], theirs, ours)
    losses[0, kept] = losses[1, kept]
    return Rounded(data, rounded, losses[0], losses[1], kept, _method(steps, curvature))


def _sought(
    form: Format,
    weights: torch.Tensor,
    start: Blocks,
    *,
    curvature: Curvature | None,
    importance: torch.Tensor,
    steps: Steps,
) -> Grid:
    """The steps, one after the other, on (n, rows) weights; `start` is ggml's rounding."""
    grid = from_blocks(form, start)
    if curvature is None:
        return search(form, weights, importance) if steps.search else grid
    if steps.feedback:
        feed_back(weights, curvature, grid, choose_scales=steps.search, conditional=steps.conditional)
    elif steps.search:
        grid = search(form, weights, curvature.diagonal)
    if steps.descent:
        descend(weights, curvature, grid, passes=steps.descent, anew=steps.blocks)
    return grid


def _loss(error: np.ndarray, curvature: Curvature | None, importance: np.ndarray) -> np.ndarray:
    """Of each row (rows, n), float64."""
    if curvature is None:
        return np.square(error, dtype=np.float64) @ importance.astype(np.float64)
    return curvature.loss(torch.from_numpy(error).T).numpy()


def _row_blocks(rows: int, n: int) -> Iterator[slice]:
    """Equal blocks of at most so many rows that work on them stays small, and H is not read for too few."""
    most = min(MOST_ROWS, max(FEWEST_ROWS, ROW_BLOCK_WEIGHTS // n))
    size = -(-rows // -(-rows // most))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def _method(steps: Steps, curvature: Curvature | None) -> str:
    """What was done, for a report."""
    names = ["scale search"] * steps.search
    if curvature is not None:
        names += ["error feedback"] * steps.feedback + ["coordinate descent"] * bool(steps.descent)
    return " + ".join(names) or "ggml"
