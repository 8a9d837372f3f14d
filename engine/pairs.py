"""The tokens that a reranking model reads of a query and a document.

As the model's own template says, else as a pair with the separators of its vocabulary. Control tokens are
those of the template: text of a user never becomes one.
"""

import re
from collections.abc import Sequence
from typing import Protocol

_SLOT = re.compile(r"\{(query|document)\}")


class Vocabulary(Protocol):
    """What is asked of a model (engine.llama.Model is one)."""

    @property
    def rerank_template(self) -> str | None: ...

    @property
    def control_texts(self) -> frozenset[str]: ...

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def sep_id(self) -> int | None: ...

    @property
    def adds_bos(self) -> bool: ...

    @property
    def adds_eos(self) -> bool: ...

    @property
    def adds_sep(self) -> bool: ...

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]: ...


class Pairs:
    """Makes pairs for one model; its template is taken apart once."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._parts = _parts(vocabulary)

    def tokens(self, query: str, document: str) -> list[int]:
        """A query and a document, ready to be scored."""
        if not self._parts:
            return self._plain(query, document)
        texts = {"query": query, "document": document}
        tokens: list[int] = []
        for part, is_control in self._parts:
            text = part if is_control else _SLOT.sub(lambda slot: texts[slot[1]], part)
            tokens += self._vocabulary.tokenize(text, add_special=False, parse_special=is_control)
        return tokens

    def _plain(self, query: str, document: str) -> list[int]:
        """[BOS] query [EOS] [SEP] document [EOS], each as far as the vocabulary adds it.

        Where it adds no end but a separator, as BERT's does, the separator also ends the document.
        """
        own = self._vocabulary
        bos = [own.bos_id] if own.adds_bos else []
        eos = [own.sep_id if own.eos_id is None else own.eos_id] if own.adds_eos else []
        sep = [own.sep_id] if own.adds_sep else []
        texts = [own.tokenize(text, add_special=False) for text in (query, document)]
        return _known([*bos, *texts[0], *eos, *sep, *texts[1], *(eos or sep)])


def _known(tokens: Sequence[int | None]) -> list[int]:
    return [token for token in tokens if token is not None]


def _parts(vocabulary: Vocabulary) -> list[tuple[str, bool]]:
    """The template as (text, whether it is a control token), in order; [] without one."""
    template = vocabulary.rerank_template
    if not template:
        return []
    longest_first = sorted(vocabulary.control_texts, key=len, reverse=True)
    if not longest_first:
        return [(template, False)]
    pieces = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", template)
    return [(piece, index % 2 == 1) for index, piece in enumerate(pieces) if piece]
