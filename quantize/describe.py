"""Say what a source is before anything is hashed or written: what cannot work is refused at once.

Reads configuration, headers and the tokenizer; never a tensor, save to see whether a stored head is the
embedding once more.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from models.gguf import read_header
from models.lora import Adapter
from quantize.convert import prepare
from quantize.frame import why_mute
from quantize.network.hessian import stored_bytes


@dataclass(frozen=True, slots=True)
class Description:
    """`notes` are for the report. `mute` says why the model cannot write texts, None when it seems to.

    `n_matrix` and `n_vector` count the numbers in tensors of two dimensions or more, and of one;
    `source_bytes` is the size of the GGUF's tensors, converted or as given, and `hessian_bytes` what the
    second moments of all inputs take on disk.
    """

    notes: tuple[str, ...]
    mute: str | None
    n_matrix: int
    n_vector: int
    n_vocab: int
    source_bytes: int
    hessian_bytes: int = 0


def describe_checkpoint(path: Path, *, pre: str | None = None, adapter: Path | None = None) -> Description:
    """Open a checkpoint folder and check it; raises what `convert` would, save for errors of the disk."""
    ready = prepare(path, adapter=Adapter.open(adapter) if adapter else None, pre=pre)
    vocabulary = ready.vocabulary
    bos, eos = vocabulary.text_of("bos"), vocabulary.text_of("eos")
    shapes = [output.shape for output in ready.outputs]
    return Description(
        notes=ready.notes,
        mute=why_mute(vocabulary.default_template, bos_token=bos, eos_token=eos),
        n_matrix=sum(math.prod(shape) for shape in shapes if len(shape) > 1),
        n_vector=sum(math.prod(shape) for shape in shapes if len(shape) == 1),
        n_vocab=len(vocabulary.pieces),
        source_bytes=sum(output.size_bytes for output in ready.outputs),
        hessian_bytes=stored_bytes((o.name, o.shape[1]) for o in ready.outputs if len(o.shape) == 2),
    )


def describe_gguf(path: Path) -> Description:
    """What the header of a GGUF says."""
    header = read_header(path)
    bos, eos = (_token(header.metadata, role) for role in ("bos", "eos"))
    return Description(
        notes=(),
        mute=why_mute(header.chat_template, bos_token=bos, eos_token=eos),
        n_matrix=sum(tensor.n_elements for tensor in header.tensors if len(tensor.shape) > 1),
        n_vector=sum(tensor.n_elements for tensor in header.tensors if len(tensor.shape) == 1),
        n_vocab=len(header.metadata.get("tokenizer.ggml.tokens", ())),
        source_bytes=header.tensor_bytes,
        hessian_bytes=stored_bytes((t.name, t.shape[0]) for t in header.tensors if len(t.shape) == 2),
    )


#: What llama.cpp takes where a SentencePiece vocabulary names none; for others it has no sound default.
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2}


def _token(metadata, role: str) -> str | None:
    """The text of a special token."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    default = SENTENCEPIECE_IDS[role] if metadata.get("tokenizer.ggml.model") == "llama" else None
    token_id = metadata.get(f"tokenizer.ggml.{role}_token_id", default)
    if not isinstance(tokens, list) or not isinstance(token_id, int) or not 0 <= token_id < len(tokens):
        return None
    return str(tokens[token_id])
