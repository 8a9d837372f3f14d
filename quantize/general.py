"""The `general.` keys of a GGUF: name, size label, licence, type of the file.

What gguf-py gathers from the folder's name, config.json, generation_config.json and the model card. Owns
one more thing: llama.cpp decides by the model's *name* whether added tokens swallow the spaces after them.
"""

import dataclasses
import re
from pathlib import Path

import gguf
import yaml

from quantize.checkpoint import InvalidCheckpoint
from quantize.gguf_files.floats import Dtype
from quantize.tokenizer.vocabulary import Vocabulary

FILE_TYPES = {
    "F32": gguf.LlamaFileType.ALL_F32,
    "F16": gguf.LlamaFileType.MOSTLY_F16,
    "BF16": gguf.LlamaFileType.MOSTLY_BF16,
}
#: llama.cpp looks these up by text when the name says Phi-3, and fails to load without them
PHI3_TOKENS = {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def write_general(writer: gguf.GGUFWriter, folder: Path, *, dtype: Dtype, vocabulary: Vocabulary) -> None:
    """Add the keys; the tensors must have been announced, for the parameters are counted."""
    total, shared, expert, n_experts = writer.get_total_parameter_count()
    metadata = _metadata(folder, total)
    metadata.name = fitting_name(metadata.name or folder.resolve().name, vocabulary)
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(total, shared, expert, n_experts)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _metadata(folder: Path, n_parameters: int) -> gguf.Metadata:
    """What gguf-py finds in the folder. It takes for granted that the model card is sound."""
    try:
        found = gguf.Metadata.load(None, folder, None, n_parameters)
    except (UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        problem = f"its front matter cannot be read ({' '.join(str(error).split())})"
        remedy = "correct it, or remove the file: only the name, the licence and the like are taken from it"
        raise InvalidCheckpoint(folder / "README.md", problem, remedy) from None
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if field.type == "Optional[str]" and value is not None and not isinstance(value, str | list):
            setattr(found, field.name, str(value))  # YAML reads `name: 5` as a number
    return found


def fitting_name(name: str, vocabulary: Vocabulary) -> str:
    """The name, saying Phi-3 exactly where the added tokens swallow spaces as Phi-3's do."""
    says = re.search(r"phi-?3", name, re.IGNORECASE) is not None
    means = _strips_as_phi3(vocabulary)
    if means and not says:
        return f"Phi-3 {name}"
    return name if means else re.sub(r"(?i)(phi)-?3", r"\1 3", name)


def strip_notes(vocabulary: Vocabulary) -> tuple[str, ...]:
    """What the user should know of added tokens that swallow spaces where llama.cpp will not."""
    if not vocabulary.strips or _strips_as_phi3(vocabulary):
        return ()
    return (
        "Some added tokens swallow the spaces and line breaks beside them, which llama.cpp does for Phi-3 "
        "alone: texts with such spaces become other tokens than in the checkpoint.",
    )


def _strips_as_phi3(vocabulary: Vocabulary) -> bool:
    return vocabulary.strips and {piece.text for piece in vocabulary.pieces} >= PHI3_TOKENS
