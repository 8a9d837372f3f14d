"""Match a checkpoint's tensors with its family's recipes, and say how each GGUF tensor is made.

Every tensor is accounted for: one that is missing, unexpected, of another shape or of an unreadable type is
an error by name. Rows stream in blocks; a tensor is whole in memory only where its rows are reordered or an
adapter is merged into it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import cast

import numpy as np

from models.lora import Adapter
from models.tensors import to_float32
from quantize.checkpoint import STORED, Checkpoint, StoredTensor, row_blocks
from quantize.errors import QuantizeError
from quantize.families.config import Config
from quantize.families.recipe import Family, Recipe
from quantize.gguf_files.floats import ITEM_BYTES, Dtype, dtype_of, from_float32

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
#: tables that older checkpoints carry and transformers recomputes
BUFFERS = (".rotary_emb.inv_freq",)


class TensorMismatch(QuantizeError):
    """A checkpoint whose tensors are not those its config.json promises."""


class ValueOutOfRange(QuantizeError):
    """A weight too large for the type it is to be stored in."""

    def __init__(self, name: str, largest: float) -> None:
        super().__init__(f"tensor {name} holds {largest:.4g}, beyond float16; give dtype BF16 or F32 instead")


@dataclass(frozen=True, slots=True)
class Output:
    """One GGUF tensor: `shape` with rows first; `blocks` yields its elements in order, in `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: Dtype
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def size_bytes(self) -> int:
        """Bytes of the elements, without padding."""
        return int(np.prod(self.shape, dtype=np.int64)) * ITEM_BYTES[self.dtype]


Match = tuple[Recipe, StoredTensor]


def match(checkpoint: Checkpoint, family: Family, config: Config) -> list[Match]:
    """Each recipe with its stored tensor; the head is left out where it is the embedding."""
    stored = _by_canonical_name(checkpoint, family)
    recipes = family.recipes(config)
    if config.flag("tie_word_embeddings") and _is_tied(stored):
        recipes = [recipe for recipe in recipes if recipe.source != HEAD]
        stored.pop(HEAD, None)
    _check_names(checkpoint, recipes, stored)
    matches = [(recipe, stored[recipe.source]) for recipe in recipes]
    for recipe, tensor in matches:
        _check_tensor(recipe, tensor)
    return matches


def is_tied(matches: list[Match]) -> bool:
    """Whether the head is the embedding."""
    return all(recipe.source != HEAD for recipe, _ in matches)


def outputs(
    matches: list[Match], generated: Mapping[str, np.ndarray], *, dtype: Dtype | None, adapter: Adapter | None
) -> list[Output]:
    """What the GGUF will hold, in its order; raises AdapterMismatch for an adapter of another model.

    `dtype` None: matrices stay as they are stored, and changed ones are float32.
    """
    if adapter is not None:
        matches = _split_head(matches, adapter)
        adapter.unused([tensor.name for _, tensor in matches])
    made = [_generated(name, values) for name, values in generated.items()]
    return made + [_output(recipe, tensor, dtype, adapter) for recipe, tensor in matches]


def main_dtype(made: list[Output]) -> Dtype:
    """The type that most bytes of the matrices have."""
    sizes: dict[Dtype, int] = dict.fromkeys(ITEM_BYTES, 0)
    for output in made:
        if len(output.shape) > 1:
            sizes[output.dtype] += output.size_bytes
    return max(sizes, key=lambda kind: sizes[kind])


def _by_canonical_name(checkpoint: Checkpoint, family: Family) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        canonical = family.canonical(name)
        if canonical is None or name.endswith(BUFFERS):
            continue
        if canonical in stored:
            raise TensorMismatch(
                f"{checkpoint.path}: tensors {stored[canonical].name} and {name} are the same one"
            )
        stored[canonical] = tensor
    return stored


def _is_tied(stored: Mapping[str, StoredTensor]) -> bool:
    """As transformers: a stored head that differs from the embedding counts as a head of its own."""
    head, embedding = stored.get(HEAD), stored.get(EMBEDDING)
    if head is None or embedding is None:
        return True
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape) or head.dtype not in STORED:
        return False
    return all(
        left is not None and right is not None and np.array_equal(left, right)
        for left, right in zip_longest(head.blocks(), embedding.blocks())
    )


def _check_names(checkpoint: Checkpoint, recipes: list[Recipe], stored: Mapping[str, StoredTensor]) -> None:
    wanted = {recipe.source for recipe in recipes}
    missing, extra = sorted(wanted - stored.keys()), sorted(stored.keys() - wanted)
    if missing:
        raise TensorMismatch(
            f"{checkpoint.path}: {len(missing)} tensors are missing: {_some(missing)}; "
            "download the checkpoint again, all of one revision"
        )
    if extra:
        raise TensorMismatch(
            f"{checkpoint.path}: {len(extra)} tensors have no place in this architecture: {_some(extra)}; "
            "the model is a variant that is not supported, or config.json belongs to another"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _check_tensor(recipe: Recipe, tensor: StoredTensor) -> None:
    if tensor.shape != recipe.shape:
        raise TensorMismatch(
            f"{tensor.file}: tensor {tensor.name} is {list(tensor.shape)}, config.json makes it "
            f"{list(recipe.shape)}; the two are not of one model"
        )
    if tensor.dtype not in STORED:
        raise TensorMismatch(
            f"{tensor.file}: tensor {tensor.name} is stored as {tensor.dtype}; "
            f"give a checkpoint in {', '.join(STORED)}"
        )


def _split_head(matches: list[Match], adapter: Adapter) -> list[Match]:
    """Where an adapter changes the embedding or the head of a tied model, each gets a tensor."""
    if not (is_tied(matches) and adapter.splits_tied_head):
        return matches
    recipe, tensor = next(one for one in matches if one[0].source == EMBEDDING)
    head = replace(recipe, source=HEAD, target="output.weight")
    return [*matches, (head, replace(tensor, name=HEAD))]


def _generated(name: str, values: np.ndarray) -> Output:
    return Output(name, values.shape, "F32", lambda: iter([values]))


def _output(recipe: Recipe, tensor: StoredTensor, dtype: Dtype | None, adapter: Adapter | None) -> Output:
    merged = adapter if adapter is not None and adapter.changes(tensor.name) else None
    unasked: Dtype = "F32" if merged else cast("Dtype", tensor.dtype)
    kept: Dtype = "F32" if len(recipe.shape) < 2 else dtype or unasked
    return Output(recipe.target, recipe.shape, kept, lambda: _blocks(recipe, tensor, kept, merged))


def _blocks(
    recipe: Recipe, tensor: StoredTensor, dtype: Dtype, adapter: Adapter | None
) -> Iterator[np.ndarray]:
    if adapter is None and not recipe.heads:
        parts = tensor.blocks()
    else:
        whole = tensor.read() if adapter is None else adapter.merge(tensor.name, to_float32(tensor.read()))
        parts = row_blocks(_interleave(whole, recipe.heads) if recipe.heads else whole)
    for part in parts:
        yield _encode(part, recipe, dtype)


def _interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Within each head, halves (x1 x2 … y1 y2 …) become pairs (x1 y1 x2 y2 …)."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _encode(values: np.ndarray, recipe: Recipe, dtype: Dtype) -> np.ndarray:
    if not recipe.shift and dtype_of(values) == dtype:
        return values
    exact = to_float32(values) + np.float32(recipe.shift) if recipe.shift else to_float32(values)
    encoded = from_float32(exact, dtype)
    if dtype == "F16" and np.isinf(encoded).any() and np.isfinite(exact).all():
        raise ValueOutOfRange(recipe.source, float(np.abs(exact).max()))
    return encoded
