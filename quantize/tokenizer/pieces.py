"""The vocabulary table of a tokenizer, id by id: learnt pieces, added tokens over them, padding to the end.

Owns texts, scores and types as llama.cpp's converter gives them; knows no files but those it is handed.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from quantize.errors import QuantizeError
from quantize.tokenizer.files import AddedToken
from quantize.tokenizer.sentencepiece_model import Piece, PieceType

ADDED_SCORE = -1000.0
PADDING_SCORE = -10_000.0


class UnsupportedTokenizer(QuantizeError):
    """A tokenizer that llama.cpp cannot run as it is."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"tokenizer.json: {problem}; byte-level BPE and SentencePiece BPE are supported")


def kind_of(spec: Mapping[str, Any]) -> str:
    """GGUF's name of the algorithm of a tokenizer.json: "gpt2" is byte-level BPE, "llama" SentencePiece's."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise UnsupportedTokenizer(f"model type {model.get('type')!r} is not supported")
    if model.get("byte_fallback"):
        return "llama"
    decoder = spec.get("decoder") or {}
    if "ByteLevel" not in [step.get("type") for step in decoder.get("decoders", [decoder])]:
        raise UnsupportedTokenizer("BPE that is neither byte-level nor has byte fallback is not supported")
    return "gpt2"


def byte_level(spec: Mapping[str, Any]) -> dict[int, Piece]:
    """The pieces of byte-level BPE; llama.cpp needs no scores for them."""
    if any(step.get("add_prefix_space") for step in steps(spec) if step.get("type") == "ByteLevel"):
        raise UnsupportedTokenizer("add_prefix_space on byte-level BPE is not supported by llama.cpp")
    learnt = spec["model"]["vocab"]
    return {token_id: Piece(text, 0.0, PieceType.NORMAL) for text, token_id in learnt.items()}


def scored(spec: Mapping[str, Any]) -> dict[int, Piece]:
    """Pieces of a tokenizer.json whose merges were made from scores: the earlier merged, the higher."""
    order: dict[str, int] = {}
    for merge in spec["model"].get("merges") or []:
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        order.setdefault(left + right, len(order))
    pieces = {}
    for text, token_id in spec["model"]["vocab"].items():
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            pieces[token_id] = Piece(text, 0.0, PieceType.BYTE)
        else:
            rank = order[text] if text in order else len(order) + token_id
            pieces[token_id] = Piece(text, float(-rank), PieceType.NORMAL)
    unknown = spec["model"].get("unk_token")
    if unknown in spec["model"]["vocab"]:
        pieces[spec["model"]["vocab"][unknown]] = Piece(unknown, 0.0, PieceType.UNKNOWN)
    return pieces


def merges(spec: Mapping[str, Any]) -> list[str]:
    """Merges as "left right"; a space within a part is written as the byte-level alphabet's Ġ."""
    found = spec["model"].get("merges") or []
    if found and isinstance(found[0], str):
        return found
    return [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in found]


def steps(spec: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The normalizers and pre-tokenizers, sequences taken apart."""
    found = []
    for name, inner in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        outer = spec.get(name) or {}
        found += outer.get(inner, [outer])
    return found


def normalizers(spec: Mapping[str, Any]) -> list[str]:
    """Types of the steps that change a text before it is split, those aside that only write spaces as ▁."""
    outer = spec.get("normalizer") or {}
    found = [step for step in outer.get("normalizers", [outer]) if step.get("type")]
    return [step["type"] for step in found if step["type"] != "Prepend" and not _escapes_spaces(step)]


def _escapes_spaces(step: Mapping[str, Any]) -> bool:
    return step["type"] == "Replace" and step.get("pattern") == {"String": " "} and step.get("content") == "▁"


def prepends_space(spec: Mapping[str, Any]) -> bool:
    """Whether a text gets a leading space before it is split."""
    for step in steps(spec):
        if step.get("type") == "Prepend":
            return True
        if step.get("type") == "Metaspace":
            legacy = "always" if step.get("add_prefix_space", True) else "never"
            return step.get("prepend_scheme", legacy) != "never"
    return False


def prepends_space_once(spec: Mapping[str, Any]) -> bool:
    """Whether the leading space is for the beginning of a text alone, which llama.cpp does not have."""
    return any(
        step.get("type") == "Metaspace" and step.get("prepend_scheme") == "first" for step in steps(spec)
    )


def overlay(pieces: dict[int, Piece], added: Iterable[AddedToken]) -> None:
    """Put the added tokens over the learnt ones."""
    for token in added:
        if token.special or _looks_special(token.text):
            pieces[token.id] = Piece(token.text, ADDED_SCORE, PieceType.CONTROL)
        else:
            # llama.cpp matches these in the text as it is, before spaces are escaped
            pieces[token.id] = Piece(token.text.replace("▁", " "), ADDED_SCORE, PieceType.USER_DEFINED)


def _looks_special(text: str) -> bool:
    """Tokens that checkpoints forget to mark as special."""
    if text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return any(text.startswith(first) and text.endswith(last) for first, last in brackets)


def drop_beyond(pieces: dict[int, Piece], n_vocab: int) -> list[str]:
    """Remove tokens that have no row in the embedding; their texts."""
    return [pieces.pop(token_id).text for token_id in sorted(pieces) if token_id >= n_vocab]


def fill(pieces: Mapping[int, Piece], n_vocab: int) -> Sequence[Piece]:
    """All pieces in id order, rows without a token padded; refuses a text with two ids."""
    full = [
        pieces.get(token_id) or Piece(f"[PAD{token_id}]", PADDING_SCORE, PieceType.UNUSED)
        for token_id in range(n_vocab)
    ]
    text, count = Counter(piece.text for piece in full).most_common(1)[0]
    if count > 1:
        raise UnsupportedTokenizer(f"token {text!r} has {count} ids, which llama.cpp refuses")
    return full
