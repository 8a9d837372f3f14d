"""Words for full-text search: what of a text SQLite's FTS5 is given, and the query it is asked.

FTS5 splits at spaces and punctuation, which fails languages that attach particles or write no spaces: Hangul
becomes content morphemes (kiwipiepy) or pairs of syllables, Chinese and Japanese pairs of characters.
"""

import functools
import importlib.util
import re
from collections.abc import Iterator
from typing import Any, Literal

from rag.errors import RagError

Mode = Literal["kiwi", "pairs"]

TOKENIZE = "porter unicode61 remove_diacritics 2"
_HANGUL = r"\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
_OTHER = r"\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUN = re.compile(f"[{_HANGUL}]+|[{_OTHER}]+")
_HANGUL_LETTER = re.compile(f"[{_HANGUL}]")
#: Nouns, verb and adjective stems, adverbs, roots, foreign words and numbers; no particles, no endings.
_CONTENT = ("NN", "NP", "NR", "VV", "VA", "MM", "MA", "XR", "SL", "SN", "SH", "XPN")
_MAX_TERMS = 128
_PIECE = 10_000  # characters analysed at once; a line may be megabytes


class MissingAnalyser(RagError):
    def __init__(self) -> None:
        super().__init__(
            "this collection was indexed with Korean morphemes and kiwipiepy is not installed here; "
            "install lq[korean], or index again with --rebuild"
        )


def best_mode() -> Mode:
    """Morphemes where kiwipiepy is installed, else pairs."""
    return "kiwi" if importlib.util.find_spec("kiwipiepy") else "pairs"


def hangul_share(text: str) -> float:
    """Hangul among the letters of a text, 0..1."""
    letters = sum(character.isalpha() for character in text)
    return len(_HANGUL_LETTER.findall(text)) / letters if letters else 0.0


def words(text: str, mode: Mode) -> str:
    """The text with runs of Hangul, Han and Kana cut into words; anything else as it is."""
    if not _RUN.search(text):
        return text
    if mode == "kiwi" and _HANGUL_LETTER.search(text):
        text = "\n".join(_morphemes(piece) for piece in _pieces(text))
        return re.sub(f"[{_OTHER}]+", _pairs, text)
    return _RUN.sub(_pairs, text)


def match(question: str, mode: Mode) -> str | None:
    """An FTS5 expression that any word of the question satisfies; None when it has no word.

    Every word is quoted: operators, quotes and brackets of the question are data.
    """
    terms = dict.fromkeys(re.findall(r"\w+", words(question, mode).lower().replace("_", " ")))
    return " OR ".join(f'"{term}"' for term in list(terms)[:_MAX_TERMS]) or None


def _pairs(found: re.Match[str]) -> str:
    run = found.group()
    return f" {' '.join(run[at : at + 2] for at in range(max(1, len(run) - 1)))} "


def _pieces(text: str) -> Iterator[str]:
    """Lines, the long ones in parts."""
    for line in text.splitlines():
        for first in range(0, len(line), _PIECE):
            yield line[first : first + _PIECE]


def _morphemes(line: str) -> str:
    """A line whose Hangul is replaced by its content morphemes, separated by spaces."""
    if not _HANGUL_LETTER.search(line):
        return line
    kept = [
        token.form
        for token in _kiwi().tokenize(line)
        if token.tag.startswith(_CONTENT) or not _HANGUL_LETTER.search(token.form)
    ]
    return " ".join(kept)


@functools.cache
def _kiwi() -> Any:
    try:
        from kiwipiepy import Kiwi
    except ImportError as error:
        raise MissingAnalyser from error
    return Kiwi(num_workers=1)
