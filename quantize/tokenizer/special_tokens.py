"""Which tokens begin and end a text or a turn, and which are put there without being asked for.

Reads what transformers would do: the tokenizer's own template, the generation configuration's stop tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from quantize.errors import QuantizeError
from quantize.tokenizer.files import ROLES, TokenizerFiles
from quantize.tokenizer.pieces import UnsupportedTokenizer

#: Texts that llama.cpp takes for the end of a turn by itself.
KNOWN_ENDS = frozenset(
    {
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
    }
    | {"<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>", "<eos>"}
)


class UnsupportedTemplate(QuantizeError):
    """A tokenizer that adds tokens which a GGUF cannot ask for."""

    def __init__(self, tokens: list[str]) -> None:
        super().__init__(
            f"tokenizer.json adds {tokens} around every text; a GGUF can ask for one before and one after"
        )


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids by role, and whether the first and the last token are added."""

    ids: Mapping[str, int]
    adds_bos: bool
    adds_eos: bool


def read_special_tokens(
    files: TokenizerFiles,
    vocabulary: Mapping[str, int],
    *,
    config: Mapping[str, Any],
    generation: Mapping[str, Any],
    tokenizer: Tokenizer | None,
) -> SpecialTokens:
    """Special tokens with an id below the vocabulary's size; `tokenizer` None: tokenizer.model only."""
    ids = {role: vocabulary[text] for role in ROLES if (text := files.text_of(role) or "") in vocabulary}
    size = len(vocabulary)
    for role in ROLES:
        value = config.get(f"{role}_token_id")
        value = value[0] if isinstance(value, list) and value else value
        if role not in ids and type(value) is int and 0 <= value < size:
            ids[role] = value
    texts = {token_id: text for text, token_id in vocabulary.items() if text in KNOWN_ENDS}
    _add_turn_ends(ids, generation.get("eos_token_id"), texts, size)
    if "eot" not in ids and "▁<EOT>" in vocabulary:
        ids["eot"] = vocabulary["▁<EOT>"]
    before, after = _around(files, tokenizer, ids)
    return _named(ids, before, after)


def _add_turn_ends(ids: dict[str, int], stops: Any, known: Mapping[int, str], size: int) -> None:
    """Give generation's stop tokens that llama.cpp would not recognise the two free roles."""
    stops = stops if isinstance(stops, list) else [stops]
    foreign = [
        stop
        for stop in stops
        if type(stop) is int and 0 <= stop < size and stop not in known and stop != ids.get("eos")
    ]
    ids.update(zip(("eot", "eom"), foreign, strict=False))


def _around(
    files: TokenizerFiles, tokenizer: Tokenizer | None, ids: Mapping[str, int]
) -> tuple[list[int], list[int]]:
    """The ids that are put before and after a text."""
    if tokenizer is None:
        before = [ids["bos"]] if files.config.get("add_bos_token", True) and "bos" in ids else []
        return before, [ids["eos"]] if files.config.get("add_eos_token", False) and "eos" in ids else []
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    dressed = tokenizer.encode("a").ids
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain), None)
    if at is None or not plain:
        raise UnsupportedTokenizer(f"its post-processor turns tokens {plain} into {dressed}")
    return dressed[:at], dressed[at + len(plain) :]


def _named(ids: dict[str, int], before: list[int], after: list[int]) -> SpecialTokens:
    """Name the first token bos and the last eos; whatever a turn ended with before becomes eot."""
    if len(before) > 1 or len(after) > 1:
        raise UnsupportedTemplate([str(token) for token in before + after])
    if before:
        ids["bos"] = before[0]
    if after and ids.get("eos", after[0]) != after[0]:
        ids.setdefault("eot", ids["eos"])
    if after:
        ids["eos"] = after[0]
    return SpecialTokens(ids, bool(before), bool(after))
