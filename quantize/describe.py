"""Say what a checkpoint is before anything is converted: for the report, the model card and `lq show`.

Reads configuration, headers and the tokenizer, never a tensor: what cannot be converted is refused at once.
"""

from dataclasses import dataclass
from pathlib import Path

from quantize.checkpoint import Checkpoint
from quantize.families.supported import recognise
from quantize.floats import Dtype
from quantize.plan import is_tied, match
from quantize.vocabulary import read_vocabulary


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """`n_parameters` counts a tied head once; `size_bytes` is that of the tensors as stored."""

    family: str
    architecture: str
    n_parameters: int
    n_layer: int
    n_embd: int
    n_vocab: int
    context_length: int
    tied: bool
    dtype: Dtype
    size_bytes: int
    notes: tuple[str, ...]


def describe(checkpoint: Path, *, pre: str | None = None) -> CheckpointInfo:
    """Open a checkpoint folder and check it; raises what `convert` would, save for errors of the disk."""
    opened = Checkpoint.open(checkpoint)
    family, config = recognise(opened.config)
    matches = match(opened, family, config)
    vocabulary = read_vocabulary(
        checkpoint,
        n_vocab=config.integer("vocab_size"),
        config=config.values,
        pre=pre,
        foreign=family.foreign_tokens,
    )
    return CheckpointInfo(
        family=family.name,
        architecture=opened.config["architectures"][0],
        n_parameters=sum(tensor.n_elements for _, tensor in matches),
        n_layer=config.integer("num_hidden_layers"),
        n_embd=config.integer("hidden_size"),
        n_vocab=config.integer("vocab_size"),
        context_length=config.integer("max_position_embeddings"),
        tied=is_tied(matches),
        dtype=opened.dtype,
        size_bytes=sum(tensor.size_bytes for _, tensor in matches),
        notes=family.notes(config) + vocabulary.notes,
    )
