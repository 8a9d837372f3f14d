"""HTML: the text a reader sees, headings, and tables as named rows. Scripts, styles and menus are dropped."""

import re
import warnings

from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
from bs4.element import NavigableString, PageElement, PreformattedString, Tag

from rag.document import Document
from rag.parse.draft import Draft, one_line
from rag.parse.encoding import decode

_DROPPED_NAMES = "script style nav noscript template svg iframe object form button select"
_BLOCK_NAMES = """
address article aside blockquote body caption center dd details dialog div dl dt fieldset figcaption figure
footer header hgroup hr html li main ol p pre search section summary table tbody td tfoot th thead tr ul
"""
_DROPPED = _DROPPED_NAMES.split()
_HEADINGS = frozenset(f"h{level}" for level in range(1, 7))
_BLOCKS = _HEADINGS.union(_BLOCK_NAMES.split())
_CHARSET = re.compile(rb"""<meta[^>]{0,200}charset=["']?([\w-]{2,40})""", re.IGNORECASE)
_WIDEST_SPAN = 50  # columns that one cell may claim


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
        if table.caption:
            self._draft.block(one_line(table.caption.get_text(" ")))
        rows = [row for row in table.find_all("tr") if isinstance(row, Tag)]
        header: list[str] = []
        if rows and _cells(rows[0]) and all(cell.name == "th" for cell in _cells(rows[0])):
            header = _texts(rows.pop(0))
        elif rows and all(len(_cells(row)) == 2 and _cells(row)[0].name == "th" for row in rows):
            for name, value in (_texts(row) for row in rows if len(_texts(row)) == 2):
                self._draft.block(f"{name}: {value}", gap="\n")
            return
        self._draft.rows(header, [_texts(row) for row in rows])


def _hidden(node: PageElement) -> bool:
    """Comments, doctypes and declarations."""
    return isinstance(node, PreformattedString)


def _is_data(table: Tag) -> bool:
    """A table of values; one that holds tables or headings is page layout."""
    return table.find(["table", *_HEADINGS]) is None


def _cells(row: Tag) -> list[Tag]:
    return [cell for cell in row.find_all(["td", "th"]) if isinstance(cell, Tag)]


def _texts(row: Tag) -> list[str]:
    """Cell texts, a spanning cell once a column, so that columns stay under their names."""
    found: list[str] = []
    for cell in _cells(row):
        span = str(cell.get("colspan") or "1")
        text = one_line(cell.get_text(" "))
        found += [text] + [""] * (min(int(span) if span.isdecimal() else 1, _WIDEST_SPAN) - 1)
    return found
