"""Put what a quantized GGUF says of the weights in the place of the checkpoint's own.

An adapter that is to run beside that file learns what its rounding did. Owns the way back from a GGUF's
names, rows and shifts to the checkpoint's.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import nn

from models.gguf import read_header
from models.lora_gguf import TRANSFORMS
from quantize.checkpoint import Checkpoint
from quantize.errors import QuantizeError
from quantize.families.recipe import Recipe
from quantize.families.supported import recognise
from quantize.network.network import OUTPUT
from quantize.network.weights import WeightFile
from quantize.plan import is_tied, match


class OtherBase(QuantizeError):
    """A GGUF that was not made of this checkpoint."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"--base {path}: {problem}; give a GGUF that was made of this checkpoint")


def check(checkpoint: Path, file: Path) -> None:
    """Raise OtherBase where architecture, names or shapes differ; reads headers only."""
    opened = Checkpoint.open(checkpoint)
    family, config = recognise(opened.config)
    header = read_header(file).require("model")
    wanted = gguf.MODEL_ARCH_NAMES[family.architecture]
    if header.architecture != wanted:
        raise OtherBase(file, f"its architecture is {header.architecture!r}, the checkpoint's is {wanted!r}")
    shapes = {tensor.name: tensor.shape[::-1] for tensor in header.tensors}
    matches = match(opened, family, config)
    for recipe, _ in matches:
        found = shapes.get(recipe.target)
        if found != recipe.shape:
            has = "lacks it" if found is None else f"has it as {list(found)}"
            raise OtherBase(file, f"the checkpoint has {recipe.target} as {list(recipe.shape)}, it {has}")
    known = {OUTPUT, *(recipe.target for recipe, _ in matches)}
    if more := sorted(name for name in set(shapes) - known if not name.startswith("rope_")):
        raise OtherBase(file, f"it has {more[0]}, which the checkpoint lacks")
    if TRANSFORMS in header.metadata:
        changes = header.metadata[TRANSFORMS]
        raise OtherBase(
            file, f"its weights were changed before rounding ({changes}), so adapters do not fit both"
        )


def fill(model: Any, checkpoint: Path, file: Path) -> None:
    """Overwrite the weights of transformers' `model`; a head that only the file has becomes the model's."""
    opened = Checkpoint.open(checkpoint)
    family, config = recognise(opened.config)
    matches = match(opened, family, config)
    weights = WeightFile.open(file)
    parameters = {family.canonical(name): each for name, each in model.named_parameters()}
    with torch.no_grad():
        for recipe, _ in matches:
            target = parameters[recipe.source]
            target.copy_(torch.from_numpy(original(weights.array(recipe.target), recipe)))
        if is_tied(matches) and OUTPUT in weights:
            head = model.get_output_embeddings()
            values = weights.read(OUTPUT, head.weight.dtype)
            head.weight = nn.Parameter(values, requires_grad=False)


def original(values: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The rows of a GGUF's tensor as the checkpoint has them."""
    if recipe.heads:
        pairs = values.reshape(recipe.heads, values.shape[0] // recipe.heads // 2, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values - np.float32(recipe.shift))
