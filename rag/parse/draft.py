"""A document while it is being written: blocks are appended, offsets follow.

Owns what a clean text is; knows no file format.
"""

import re
import unicodedata
from collections.abc import Sequence

from rag.document import Document, Heading, Unreadable

# Control characters, lone surrogates, byte order marks: nothing that a database or a model should see.
_JUNK = re.compile("[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff\ufeff\ufffe]")
#: Characters of a cell that spans rows which every one of them repeats, so that each can be read alone.
LONGEST_REPEATED = 100
_NEWLINE = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")


def clean(text: str) -> str:
    """Newlines as \\n, composed characters (NFC), nothing invisible that is not white space."""
    return unicodedata.normalize("NFC", _JUNK.sub("", _NEWLINE.sub("\n", text)))


def row(header: Sequence[str], cells: Sequence[str]) -> str:
    """One table row that can be read without the rows above it: `name: value; name: value`."""
    named = [*header, *[""] * (len(cells) - len(header))]
    pairs = [(one_line(name), one_line(cell)) for name, cell in zip(named, cells, strict=False)]
    return "; ".join(f"{name}: {cell}" if name else cell for name, cell in pairs if cell)


def one_line(text: str) -> str:
    return " ".join(text.split())


class Draft:
    def __init__(self) -> None:
        self._parts: list[str] = []
        self._length = 0
        self._headings: list[Heading] = []
        self._pages: list[tuple[int, int]] = []
        self._breaks: list[int] = []

    @property
    def headings(self) -> Sequence[Heading]:
        return self._headings

    def block(self, text: str, *, gap: str = "\n\n") -> int:
        """Append a paragraph, row or page; returns where it begins. Blank blocks leave no trace."""
        text = clean(text).strip("\n").rstrip()
        if not text.strip():
            return self._length
        if self._parts:
            self._parts.append(gap)
            self._length += len(gap)
        start = self._length
        self._parts.append(text)
        self._length += len(text)
        self._breaks.append(start)
        return start

    def heading(self, title: str, *, level: int, source: str | None = None) -> None:
        """Append a heading; `source` is how its line is written in the text, if not as the title."""
        title = one_line(clean(title))
        if title:
            start = self.block(source or title)
            self._headings.append(Heading(title=title, level=min(max(level, 1), 6), start=start))

    def rows(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table, each row naming its columns; the names alone where no row has text."""
        gap = "\n\n"
        lines = [line for cells in rows if (line := row(header, cells))]
        for line in lines or [row((), header)]:
            if line:
                self.block(line, gap=gap)
                gap = "\n"

    def page(self, number: int, text: str, *, gap: str) -> int:
        """Append a page; a page without text is not listed."""
        before = self._length
        start = self.block(text, gap=gap)
        if self._length > before:
            self._pages.append((start, number))
        return start

    def mark(self, headings: Sequence[Heading], breaks: Sequence[int] = ()) -> None:
        """Headings and breaks found in the text already appended."""
        self._headings = sorted([*self._headings, *headings], key=lambda heading: heading.start)
        self._breaks = sorted({*self._breaks, *breaks})

    def finish(self, *, title: str) -> Document:
        """The document; Unreadable when nothing was written."""
        if not self._parts:
            raise Unreadable("it holds no text")
        top = next((one.title for one in self._headings if one.level == 1), "")
        return Document(
            text="".join(self._parts),
            title=one_line(clean(title)) or top,
            headings=tuple(self._headings),
            pages=tuple(self._pages),
            breaks=tuple(self._breaks),
        )
