"""What a parser hands over: one text, and where its parts begin.

Knows no file format and no tokenizer. Every number is a character offset into `text`.
"""

from bisect import bisect_right
from dataclasses import dataclass

from rag.errors import RagError


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading line of the text; `start` is where the line begins, `level` is 1 (top) to 6."""

    title: str
    level: int
    start: int


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file.

    `headings` and `breaks` ascend. `pages` are (offset where the page begins, page number) and empty for
    formats without pages. `breaks` are offsets where a paragraph, row or block begins: the preferred cuts.
    `note` says what of the file is not in the text, such as pages that are pictures.
    """

    text: str
    title: str
    headings: tuple[Heading, ...] = ()
    pages: tuple[tuple[int, int], ...] = ()
    breaks: tuple[int, ...] = ()
    note: str = ""

    def page_at(self, offset: int) -> int | None:
        """The number of the page that holds the character at `offset`."""
        index = bisect_right(self.pages, offset, key=lambda page: page[0]) - 1
        return self.pages[index][1] if index >= 0 else None


class Unreadable(RagError):
    """A file whose text cannot be had, with the reason in one sentence; it is skipped and reported."""
