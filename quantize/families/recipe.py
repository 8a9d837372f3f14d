"""What a family is: the names and shapes of its checkpoint, and what each tensor becomes in a GGUF.

Pure description; nothing here reads a file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from quantize.families.config import Config


@dataclass(frozen=True, slots=True)
class Recipe:
    """One tensor: where it comes from and what is done to it on the way.

    `shape` is the checkpoint's. `heads` > 0: the rows of each head go from two halves (x1…, y1…) to
    pairs (x1, y1, …), as llama.cpp's rotary embedding wants them. `shift` is added to every element.
    """

    source: str
    target: str
    shape: tuple[int, ...]
    heads: int = 0
    shift: float = 0.0


def same(name: str) -> str | None:
    """The canonical name of a tensor whose checkpoint uses canonical names."""
    return name


def nothing(_: Config) -> Mapping[str, np.ndarray]:
    """No tensors beyond the checkpoint's."""
    return {}


def no_notes(_: Config) -> tuple[str, ...]:
    """Nothing that the user should know."""
    return ()


@dataclass(frozen=True, slots=True)
class Family:
    """A group of transformers classes that become one GGUF architecture."""

    name: str
    classes: tuple[str, ...]
    architecture: gguf.MODEL_ARCH
    #: what the transformers class assumes where config.json says nothing
    defaults: Mapping[str, Any]
    #: raises UnsupportedConfig
    check: Callable[[Config], None]
    hyperparameters: Callable[[Config, gguf.GGUFWriter], None]
    recipes: Callable[[Config], list[Recipe]]
    #: tensors that no checkpoint holds, by GGUF name, float32
    generated: Callable[[Config], Mapping[str, np.ndarray]] = nothing
    #: checkpoint name -> canonical name; None for a part that is left out on purpose
    canonical: Callable[[str], str | None] = same
    #: what the user should know about this model's GGUF
    notes: Callable[[Config], tuple[str, ...]] = no_notes
    #: added tokens beyond the embedding that belong to a part left out
    foreign_tokens: frozenset[str] = field(default_factory=frozenset)
