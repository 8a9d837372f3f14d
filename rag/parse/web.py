"""HTML: the text a reader sees, headings, and tables as named rows. Scripts, styles and menus are dropped."""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, PageElement, PreformattedString, Tag

from rag.document import Document
from rag.parse.draft import LONGEST_REPEATED, Draft, one_line
from rag.parse.encoding import decode

_DROPPED_NAMES = "script style nav noscript template svg iframe object button select"
_BLOCK_NAMES = """
address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
footer form header hgroup hr html li main ol p pre search section summary table tbody td tfoot th thead tr ul
"""
_DROPPED = _DROPPED_NAMES.split()
_HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
_BLOCKS = _HEADINGS.union(_BLOCK_NAMES.split())
_CHARSET = re.compile(rb"""<meta[^>]{0,200}charset=["']?([\w-]{2,40})""", re.IGNORECASE)
_WIDEST_SPAN, _TALLEST_SPAN = 50, 500  # columns and rows that one cell may claim


def parse(data: bytes) -> Document:
    soup = _soup(data)
    title = soup.title.get_text() if soup.title else ""
    for tag in soup(_DROPPED):
        tag.decompose()
    draft = Draft()
    _Reader(draft).read(soup.body or soup)
    top = [one.title for one in draft.headings if one.level == 1]
    return draft.finish(title=top[0] if top else title)


def _soup(data: bytes) -> BeautifulSoup:
    declared = _CHARSET.search(data[:4096])
    text = decode(data, declared=declared[1].decode("ascii") if declared else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML is read as HTML on purpose
        return BeautifulSoup(re.sub(r"\A\s*<\?xml[^>]*\?>", "", text), "lxml")


class _Reader:
    """Walks the tree in reading order; inline text gathers until a block begins or ends."""

    def __init__(self, draft: Draft) -> None:
        self._draft = draft
        self._inline: list[str] = []
        self._prefix = ""

    def read(self, root: Tag) -> None:
        # An explicit stack: documents nest deeper than Python recurses.
        stack: list[tuple[PageElement, bool]] = [(root, False)]
        while stack:
            node, leaving = stack.pop()
            if isinstance(node, NavigableString):
                self._text(node)
            elif not isinstance(node, Tag):
                continue
            elif leaving:
                self._flush()
                self._prefix = "" if node.name == "li" else self._prefix
            elif not self._whole(node):
                if node.name in _BLOCKS:
                    self._flush()
                    self._prefix = "- " if node.name == "li" else self._prefix
                    stack.append((node, True))
                stack.extend((child, False) for child in reversed(node.contents) if not _hidden(child))
        self._flush()

    def _whole(self, tag: Tag) -> bool:
        """Elements that are read as one; False for those to walk into."""
        if tag.name == "br":
            self._inline.append("\n")
        elif tag.name == "img":
            self._inline.append(str(tag.get("alt") or ""))
        elif tag.name in _HEADINGS:
            self._flush()
            self._draft.heading(tag.get_text(" "), level=int(tag.name[1]))
        elif tag.name == "pre":
            self._flush()
            for line_break in tag("br"):
                line_break.replace_with("\n")
            self._draft.block(tag.get_text())
        elif tag.name == "table" and _is_data(tag):
            self._flush()
            self._table(tag)
        else:
            return False
        return True

    def _text(self, node: NavigableString) -> None:
        self._inline.append(re.sub(r"\s+", " ", node))

    def _flush(self) -> None:
        lines = [one_line(line) for line in "".join(self._inline).split("\n")]
        text = "\n".join(line for line in lines if line)
        if text:
            self._draft.block(self._prefix + text, gap="\n" if self._prefix else "\n\n")
            self._prefix = ""
        self._inline = []

    def _table(self, table: Tag) -> None:
        """The caption and any text beside the cells, then the rows."""
        self._draft.block(one_line(" ".join(_beside_cells(table))))
        grid = _grid([row for row in table.find_all("tr") if isinstance(row, Tag)])
        if grid and all(len(row) == 2 and row[0].is_name and not row[1].is_name for row in grid):
            self._draft.rows((), [[f"{name.text}: {value.text}"] for name, value in grid])
            return
        n_names = _header_rows(grid)
        header = [" ".join(dict.fromkeys(names)).strip() for names in _columns(grid[:n_names])]
        rows = [["" if cell.continues else cell.text for cell in row] for row in grid[n_names:]]
        self._draft.rows(header, rows)


def _beside_cells(table: Tag) -> Iterator[str]:
    """Texts of a table that are in no cell of it."""
    stack: list[PageElement] = [table]
    while stack:
        node = stack.pop()
        if isinstance(node, Tag) and node.name not in ("td", "th"):
            stack.extend(reversed(node.contents))
        elif isinstance(node, NavigableString) and not _hidden(node):
            yield node


@dataclass(slots=True)
class _Cell:
    """`continues`: it stands right of where its text does; `n_below`: rows that it still spans."""

    text: str
    is_name: bool
    continues: bool = False
    n_below: int = 0


def _grid(rows: Sequence[Tag]) -> list[list[_Cell]]:
    """Cells under their columns; a short one that spans rows is in each, so that each can be read alone."""
    grid: list[list[_Cell]] = []
    above: list[_Cell] = []
    for row in rows:
        line: list[_Cell] = []
        for tag in _cells(row):
            _carry(line, above)
            text, is_name = one_line(tag.get_text(" ")), tag.name == "th"
            below = _span(tag, "rowspan", _TALLEST_SPAN) - 1
            for number in range(_span(tag, "colspan", _WIDEST_SPAN)):
                line.append(_Cell(text, is_name, number > 0, below))
        if line:
            _carry(line, above)
            grid.append(line)
            above = line
    return grid


def _carry(line: list[_Cell], above: Sequence[_Cell]) -> None:
    """Append what the row above spans down to here."""
    while len(line) < len(above) and above[len(line)].n_below:
        cell = above[len(line)]
        text = cell.text if len(cell.text) <= LONGEST_REPEATED else ""
        line.append(_Cell(text, cell.is_name, cell.continues, cell.n_below - 1))


def _span(tag: Tag, name: str, most: int) -> int:
    """1 to `most`; rows may span "0", which means all that follow."""
    value = str(tag.get(name) or "1").strip()
    count = int(value[:9]) if value.isdecimal() else 1
    return min(count or (most if name == "rowspan" else 1), most)


def _header_rows(grid: Sequence[Sequence[_Cell]]) -> int:
    """Rows of names at the top: the first, and those that its cells span or that divide its columns."""
    if not grid or not all(cell.is_name for cell in grid[0]):
        return 0
    n_names = 1 + max(cell.n_below for cell in grid[0])
    n_names = max(n_names, 2 if any(cell.continues for cell in grid[0]) else 1)
    return next(
        (n for n, row in enumerate(grid[:n_names]) if not all(cell.is_name for cell in row)),
        min(n_names, len(grid)),
    )


def _columns(rows: Sequence[Sequence[_Cell]]) -> list[list[str]]:
    """The texts of each column from top to bottom."""
    width = max(map(len, rows), default=0)
    return [[row[column].text for row in rows if column < len(row)] for column in range(width)]


def _hidden(node: PageElement) -> bool:
    """Comments, doctypes and declarations."""
    return isinstance(node, PreformattedString)


def _is_data(table: Tag) -> bool:
    """A table of values; one that holds tables or headings is page layout."""
    return table.find(["table", *_HEADINGS]) is None


def _cells(row: Tag) -> list[Tag]:
    return [cell for cell in row.find_all(["td", "th"]) if isinstance(cell, Tag)]
