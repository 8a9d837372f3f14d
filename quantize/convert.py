"""Turn a Hugging Face checkpoint into a GGUF, tensor by tensor, an adapter merged on the way.

Owns the order of the work; families know names and shapes, `checkpoint` knows safetensors, `vocabulary`
knows tokenizers, `gguf_file` the destination. Never imports torch or transformers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf

from models.gguf import Header, read_header
from models.lora import Adapter
from quantize.checkpoint import Checkpoint
from quantize.families.supported import recognise
from quantize.general import strip_notes, write_general
from quantize.gguf_files import writer as gguf_file
from quantize.gguf_files.floats import Dtype
from quantize.gguf_files.writer import Progress
from quantize.plan import Output, main_dtype, match, outputs
from quantize.tokenizer.vocabulary import Vocabulary, read_vocabulary

__all__ = ["Dtype", "Prepared", "Progress", "convert", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A conversion of which only the tensors' data is missing; `notes` are for the user."""

    writer: gguf.GGUFWriter
    outputs: Sequence[Output]
    vocabulary: Vocabulary
    notes: tuple[str, ...]


def convert(
    checkpoint: Path,
    out: Path,
    *,
    dtype: Dtype | None = None,
    adapter: Adapter | None = None,
    pre: str | None = None,
    progress: Progress | None = None,
) -> Header:
    """Write the GGUF `out` from a checkpoint folder and return its header.

    `dtype` is that of the matrices. None: each keeps the checkpoint's, and is float32 where an adapter is
    merged into it, for bfloat16 would round a small change away. Norms and biases are float32 always.
    `pre` names the splitting rule of a byte-level tokenizer that is not recognised. Peak memory is about one
    tensor and the vocabulary. Raises QuantizeError or ModelsError; then nothing is at `out` that was not.
    """
    ready = prepare(checkpoint, dtype=dtype, adapter=adapter, pre=pre)
    gguf_file.write(out, ready.writer, ready.outputs, progress=progress)
    return read_header(out)


def prepare(
    checkpoint: Path, *, dtype: Dtype | None = None, adapter: Adapter | None = None, pre: str | None = None
) -> Prepared:
    """Everything up to the first byte written: what cannot be converted is refused here."""
    opened = Checkpoint.open(checkpoint)
    family, config = recognise(opened.config)
    matches = match(opened, family, config)
    made = outputs(matches, family.generated(config), dtype=dtype, adapter=adapter)
    vocabulary = read_vocabulary(
        checkpoint,
        n_vocab=config.integer("vocab_size"),
        config=config.values,
        pre=pre,
        foreign=family.foreign_tokens,
    )
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.architecture])
    gguf_file.announce(writer, made)
    write_general(writer, checkpoint, dtype=main_dtype(made), vocabulary=vocabulary)
    family.hyperparameters(config, writer)
    vocabulary.write(writer)
    notes = family.notes(config) + vocabulary.notes + strip_notes(vocabulary)
    return Prepared(writer, made, vocabulary, notes)
