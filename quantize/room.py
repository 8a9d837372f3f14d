"""How much disk a run will take at least, told before the work instead of in its middle.

Owns the estimate, which is never above the truth: a run that would fit is not refused.
"""

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from models.tensor_types import TensorType
from quantize.describe import Description
from quantize.errors import QuantizeError
from quantize.steps import Step

#: Recipes by the smallest tensor type in them, where that is not what their name begins with.
SMALLEST: Mapping[str, str] = {
    "IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S", "IQ2_M": "IQ2_S", "IQ2_S": "IQ2_XS",
    "MXFP4_MOE": "MXFP4",
}  # fmt: skip


class NoRoom(QuantizeError):
    """A disk that cannot take what the run will write."""

    def __init__(self, folder: Path, needed: Mapping[str, int], free: int) -> None:
        largest = sorted(needed.items(), key=lambda item: -item[1])[:4]
        told = ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in largest)
        super().__init__(
            f"the run will write {sum(needed.values()) / 1e6:.0f} MB or more below {folder} ({told}), and "
            f"{free / 1e6:.0f} MB are free; make room, choose another --out, or give fewer --types or fewer "
            "--eval-tokens"
        )


def least_bytes(kind: str, description: Description) -> int:
    """A file of a type holds at least this: every matrix as the smallest type of the recipe, vectors F32."""
    name = SMALLEST.get(kind, kind)
    if name not in TensorType.__members__:
        name = name.rpartition("_")[0]  # Q4_K_M -> Q4_K
    bits = TensorType[name].bits_per_weight
    return int(description.n_matrix * bits / 8) + 4 * description.n_vector


def refuse_too_small_a_disk(folder: Path, pending: Iterable[Step]) -> None:
    """Raise NoRoom where the steps yet to run write more than is free; what they replace counts as free."""
    needed = {step.name: max(0, step.least_bytes - _present(step)) for step in pending}
    free = shutil.disk_usage(folder).free
    if sum(needed.values()) > free:
        raise NoRoom(folder, {name: size for name, size in needed.items() if size}, free)


def _present(step: Step) -> int:
    return sum(path.stat().st_size for path in step.outputs if path.is_file())
