"""Where a text may be cut, from the best place to the worst.

Headings by level, then blocks, sentences, lines, words, tokens.
Knows offsets and token spans. Sizes, overlap and what a piece is for are the caller's business.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from rag.document import Document

# Bounded and possessive on purpose: each character is read a fixed number of times, whatever the text.
_SENTENCE = re.compile(
    r"""(?<!\b[A-Z])[.!?…]["'”’)\]」』]{0,3}\s++(?![a-z])   # "J. Doe" and "e.g. this" do not end here
      | [。！？｡]["'”’」』）]{0,3}\s*+""",
    re.VERBOSE,
)
_BLANK_LINE = re.compile(r"\n[ \t]*+\n\s*+")
_LINE = re.compile(r"\n\s*+")

_LONG_SPAN = 100  # characters; vocabularies give up on such words and call them one unknown token
_PIECE = 2  # characters that one token of such a word is taken to be


class Tokens:
    """Token spans of one text, searchable by offset."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        for start, end in spans:
            if end - start <= _LONG_SPAN:
                if end > start:
                    self.starts.append(start)
                    self.ends.append(end)
                continue
            self.starts.extend(range(start, end, _PIECE))
            self.ends.extend(range(start + _PIECE, end, _PIECE))
            self.ends.append(end)

    def __len__(self) -> int:
        return len(self.starts)

    def first(self, offset: int) -> int:
        """Index of the first token that ends after `offset`."""
        return bisect_right(self.ends, offset)

    def count(self, start: int, end: int) -> int:
        """Tokens that touch text[start:end]."""
        return max(0, bisect_left(self.starts, end) - self.first(start))

    def offset(self, index: int, *, end: int) -> int:
        """Where token `index` begins, or `end` past the last token."""
        return min(self.starts[index], end) if index < len(self.starts) else end


class Cuts:
    """The places of one document, in lists from the strongest to the weakest."""

    def __init__(self, document: Document, tokens: Tokens) -> None:
        self.text = document.text
        self.tokens = tokens
        self.headings = {heading.start for heading in document.headings}
        orphaning = {_body(document.text, heading.start) for heading in document.headings}
        blocks = {*document.breaks, *_ends(_BLANK_LINE, self.text)}
        strongest_first: list[Iterable[int]] = [
            (heading.start for heading in document.headings if heading.level == level)
            for level in range(1, 7)
        ]
        strongest_first += [blocks, _ends(_SENTENCE, self.text), _ends(_LINE, self.text)]
        self._levels = [sorted(set(offsets) - orphaning) for offsets in strongest_first]
        self._sentences = sorted({*self._levels[-3], *self._levels[-2]})

    def best(self, start: int, end: int, *, least: int, limit: int) -> int:
        """The end of a piece from `start`: `least` to `limit` tokens on, at the strongest place."""
        first = self.tokens.first(start)
        latest = self.tokens.offset(first + limit, end=end)
        if latest >= end:
            return end
        earliest = max(start + 1, self.tokens.offset(first + least, end=end))
        for offsets in self._levels:
            found = _last(offsets, earliest, latest)
            if found is not None:
                return found
        return self._word(first + least, first + limit, earliest) or self._token(first + limit, start, end)

    def back(self, cut: int, *, start: int, overlap: int) -> int:
        """Where the piece after `cut` begins so that it repeats at most `overlap` tokens of the one before.

        The earliest sentence in reach, else the earliest word. Nothing is repeated across a heading: the
        piece after it is a new subject.
        """
        if cut in self.headings or overlap == 0:
            return cut
        first = bisect_left(self.tokens.starts, cut)
        reach = max(start + 1, self.tokens.offset(first - overlap, end=cut))
        index = bisect_left(self._sentences, reach)
        if index < len(self._sentences) and self._sentences[index] < cut:
            return self._sentences[index]
        words = (self.tokens.starts[i] for i in range(max(0, first - overlap), first))
        return next((at for at in words if at >= reach and self.text[at - 1].isspace()), cut)

    def _word(self, least: int, limit: int, earliest: int) -> int | None:
        for index in range(min(limit, len(self.tokens) - 1), least - 1, -1):
            at = self.tokens.starts[index]
            if at < earliest:
                return None
            if self.text[at - 1].isspace() or self.text[at].isspace():
                return at
        return None

    def _token(self, index: int, start: int, end: int) -> int:
        """A token's beginning past `start`; several tokens may share one character."""
        return self.tokens.offset(max(index, bisect_right(self.tokens.starts, start)), end=end)


def _ends(pattern: re.Pattern[str], text: str) -> list[int]:
    return [match.end() for match in pattern.finditer(text)]


def _body(text: str, heading: int) -> int:
    """Where the text under a heading line begins: to cut there would orphan the heading."""
    line_end = text.find("\n", heading)
    match = _LINE.match(text, line_end) if line_end >= 0 else None
    return match.end() if match else len(text)


def _last(offsets: Sequence[int], earliest: int, latest: int) -> int | None:
    index = bisect_right(offsets, latest) - 1
    return offsets[index] if index >= 0 and offsets[index] >= earliest else None
