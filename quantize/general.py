"""The `general.` keys of a GGUF: name, size label, licence, type of the file.

What gguf-py gathers from the folder's name, config.json, generation_config.json and the model card. Owns
one more thing: llama.cpp decides by the model's *name* whether added tokens swallow the spaces after them.
"""

import re
from pathlib import Path

import gguf

from quantize.floats import Dtype
from quantize.vocabulary import Vocabulary

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
    metadata = gguf.Metadata.load(None, folder, None, total)
    metadata.name = fitting_name(metadata.name or folder.resolve().name, vocabulary)
    if metadata.size_label is None:
        metadata.size_label = gguf.size_label(total, shared, expert, n_experts)
    writer.add_type(gguf.GGUFType.MODEL)
    metadata.set_gguf_meta_model(writer)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def fitting_name(name: str, vocabulary: Vocabulary) -> str:
    """The name, saying Phi-3 exactly where the added tokens swallow spaces as Phi-3's do."""
    says = re.search(r"phi-?3", name, re.IGNORECASE) is not None
    means = vocabulary.strips and {piece.text for piece in vocabulary.pieces} >= PHI3_TOKENS
    if means and not says:
        return f"Phi-3 {name}"
    return name if means else re.sub(r"(?i)(phi)-?3", r"\1 3", name)
