"""Cut a document into chunks for the reader and windows for the embedder.

A chunk is what a language model is shown; its windows are what the embedder sees, because embedders read
fewer tokens than a good chunk has. The document is tokenized once and all sizes are counted on those spans.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rag.cuts import Cuts, Tokens
from rag.document import Document, Heading
from rag.errors import RagError

Spans = Callable[[str], Sequence[tuple[int, int]]]
"""Character spans of the tokens of a text, ascending."""


class InvalidChunking(RagError):
    """Sizes with which a document cannot be cut."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """`document.text[start:end]`, with the heading path and page where it begins.

    `windows` are spans inside the chunk that cover it, each within the embedder's budget.
    """

    start: int
    end: int
    heading: str
    page: int | None
    n_tokens: int
    windows: tuple[tuple[int, int], ...]


def chunk(
    document: Document, spans: Spans, *, chunk_tokens: int, overlap: int, window_tokens: int
) -> list[Chunk]:
    """Chunks of at most `chunk_tokens` tokens that cover the document, small sections merged.

    Neighbours share up to `overlap` tokens, back to the beginning of a sentence, except across a heading.
    """
    _check(chunk_tokens, overlap, window_tokens)
    tokens = Tokens(spans(document.text))
    cuts = Cuts(document, tokens)
    paths = _Paths(document.headings)
    return [
        Chunk(
            start=start,
            end=end,
            heading=paths.common(start, end),
            page=document.page_at(start),
            n_tokens=tokens.count(start, end),
            windows=tuple(_windows(document.text, cuts, start, end, window_tokens)),
        )
        for start, end in _chunks(document.text, cuts, chunk_tokens, overlap)
    ]


def _check(chunk_tokens: int, overlap: int, window_tokens: int) -> None:
    if chunk_tokens < 2:
        raise InvalidChunking(f"chunk size {chunk_tokens} is too small: give 2 tokens at least")
    if not 0 <= 2 * overlap < chunk_tokens:
        most = (chunk_tokens - 1) // 2
        raise InvalidChunking(
            f"overlap {overlap} does not fit chunks of {chunk_tokens} tokens: use 0 to {most}"
        )
    if window_tokens < 1:
        raise InvalidChunking(f"an embedder of {window_tokens} tokens cannot read anything: use another one")


def _chunks(text: str, cuts: Cuts, limit: int, overlap: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    start, end = _trim(text, 0, len(text))
    while start < end:
        ahead = cuts.tokens.count(start, end)
        # A short rest is left long enough to stand alone.
        most = min(limit, max(limit // 2 + 1, ahead - limit // 4)) if ahead > limit else limit
        cut = cuts.best(start, end, least=limit // 2, limit=most)
        piece = _trim(text, start, cut)
        if piece[0] < piece[1]:
            found.append(piece)
        if cut >= end:
            break
        start = _trim(text, cuts.back(cut, start=start, overlap=overlap), end)[0]
    return found


def _windows(text: str, cuts: Cuts, start: int, end: int, limit: int) -> list[tuple[int, int]]:
    """Windows end early at a heading, so that a short section is embedded as itself."""
    found: list[tuple[int, int]] = []
    while start < end:
        cut = cuts.best(start, end, least=limit // 3, limit=limit)
        found.append(_trim(text, start, cut))
        start = _trim(text, cut, end)[0]
    return found


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its edges."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


class _Paths:
    """The headings above any offset."""

    def __init__(self, headings: Sequence[Heading]) -> None:
        self._starts = [heading.start for heading in headings]
        self._paths: list[tuple[str, ...]] = []
        above: list[Heading] = []
        for heading in headings:
            above = [*(one for one in above if one.level < heading.level), heading]
            self._paths.append(tuple(one.title for one in above))

    def common(self, start: int, end: int) -> str:
        """The path at `start`, cut down to what every section of text[start:end] shares."""
        first = bisect_right(self._starts, start) - 1
        path = self._paths[first] if first >= 0 else ()
        for index in range(first + 1, bisect_right(self._starts, end - 1)):
            path = _shared(path, self._paths[index])
        return " > ".join(path)


def _shared(one: tuple[str, ...], other: tuple[str, ...]) -> tuple[str, ...]:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return one[:length]
