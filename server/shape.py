"""How much context a model gets and for how many at once, where the operator does not say.

From what the model was trained on and the memory that models may take. Pure arithmetic; opens nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from models.footprint import Footprint
from models.placement import Bytes

#: Requests decoded together. Each more costs the others little as long as a step is bound by reading weights:
#: two cores write 1.8 times as much for 8 as for 1 (docs/log.md).
PARALLEL_CPU = 8
PARALLEL_ONE_CORE = 4
PARALLEL_GPU = 32
#: Tokens of context for each of them on average. With a longer n_ctx any of them may use up to that, while
#: others use less: they share one memory then, which the engine serves somewhat slower than one for each.
CELLS_EACH = 8192
#: Where memory is short, fewer requests at once come before less than this for each.
FEWEST_CELLS_EACH = 2048
#: The share of the room beside the weights that context takes of its own accord.
CONTEXT_SHARE = 0.5
#: Context of a model that does not say what it was trained on, and the least that is worth serving.
UNKNOWN_N_CTX = 4096
LEAST_N_CTX = 512
#: Chosen numbers are multiples of this, as llama.cpp pads them.
STEP = 256

Cost = Callable[[int, int], Footprint]  # (n_cells, n_parallel) -> what the engine takes then


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of one request, requests at once, tokens of all of them."""

    n_ctx: int
    n_parallel: int
    n_cells: int


def choose(
    cost: Cost,
    *,
    n_ctx_train: int | None,
    room: Bytes,
    n_cores: int,
    on_gpu: bool,
    n_ctx: int | None = None,
    n_parallel: int | None = None,
    kv_cells: int | None = None,
    least: int = LEAST_N_CTX,
) -> Shape:
    """The shape with what is given kept as it is; it may need more than `room` only because of that.

    `least`: cells that are taken even where they are more than a share of the room.
    """
    longest = n_ctx or n_ctx_train or UNKNOWN_N_CTX
    least = min(longest, least)
    is_given = n_ctx is not None and n_parallel is not None

    def cells(count: int) -> int:
        if kv_cells is not None:
            return kv_cells
        wanted = longest * count if is_given else min(longest * count, max(longest, CELLS_EACH * count))
        share = 1.0 if is_given else CONTEXT_SHARE
        return min(wanted, max(least, fitting(cost, count, room, share=share)))

    parallel = n_parallel or default_parallel(n_cores, on_gpu=on_gpu)
    if n_parallel is None:
        each = min(longest, FEWEST_CELLS_EACH)
        while parallel > 1 and cells(parallel) < each * parallel:
            parallel //= 2
    n_cells = cells(parallel)
    chosen = n_ctx or _rounded(min(longest, n_cells), longest)
    if kv_cells is None:
        n_cells = max(chosen, _rounded(n_cells, chosen * parallel))
    return Shape(chosen, parallel, min(n_cells, chosen * parallel))


def fitting(cost: Cost, n_parallel: int, room: Bytes, *, share: float) -> int:
    """Cells that cost this share of the room which the rest leaves, in the memory that is the first to fill.

    Below 0 where the rest leaves none.
    """
    base = cost(0, n_parallel).place
    each = cost(STEP, n_parallel).place - base
    free = room - base
    found = [STEP * share * free.host / each.host] if each.host else []
    found += [STEP * share * free.device / each.device] if each.device else []
    return int(min(found)) if free.host >= 0 <= free.device else -1


def default_parallel(n_cores: int, *, on_gpu: bool) -> int:
    """Requests decoded together on such a machine."""
    if on_gpu:
        return PARALLEL_GPU
    return PARALLEL_CPU if n_cores > 1 else PARALLEL_ONE_CORE


def rooms(bases: list[Bytes], budget: Bytes) -> list[Bytes]:
    """What each model may take, given what each takes without context.

    What the bases leave is shared evenly, so that all can be loaded together. Where the bases alone are too
    much, models take turns anyway, and each may have everything.
    """
    left = budget - sum(bases, Bytes(0))
    if left.host <= 0 or left.device < 0:
        return [budget] * len(bases)
    count = len(bases)
    return [base + Bytes(left.host // count, left.device // count) for base in bases]


def _rounded(value: int, whole: int) -> int:
    """Down to a multiple of STEP, unless it is all that was wanted."""
    return value if value == whole else max(STEP, value // STEP * STEP)
