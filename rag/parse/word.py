"""Word (.docx): paragraphs, headings, tables and text boxes in the order of the body.

Reads the elements itself: python-docx passes over tracked insertions, content controls and text boxes.
Tracked changes count as accepted: what was deleted stays out.
"""

import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import ParseError

import docx
from docx.document import Document as WordFile
from docx.opc.exceptions import PackageNotFoundError
from docx.oxml.ns import qn
from docx.text.paragraph import Paragraph
from lxml.etree import LxmlError

from rag.document import Document, Unreadable
from rag.parse.draft import LONGEST_REPEATED, Draft, row

_OLE = b"\xd0\xcf\x11\xe0"  # the container of old .doc files and of encrypted .docx
_LARGEST = 256 << 20  # bytes unpacked, all parts together
_LEVEL = re.compile(r"(?:heading|제목) ?(\d)$", re.IGNORECASE)
_PARAGRAPH, _TABLE, _ROW, _CELL = map(qn, ("w:p", "w:tbl", "w:tr", "w:tc"))
_CONTROL, _BOX = qn("w:sdt"), qn("w:txbxContent")
_MARKUP = "{http://schemas.openxmlformats.org/markup-compatibility/2006}"
#: What of the text is not shown: deleted, moved away, codes, readings, and copies for older programs.
_UNSEEN = {
    *map(qn, ("w:del", "w:moveFrom", "w:delText", "w:instrText", "w:rt", "w:pPr", "w:rPr", "w:sdtPr")),
    f"{_MARKUP}Fallback",
}
_TEXT = {qn("w:t"), qn("m:t")}
_SIGNS = {qn("w:tab"): "\t", qn("w:br"): "\n", qn("w:cr"): "\n", qn("w:noBreakHyphen"): "-"}
_WIDEST_SPAN = 50  # columns that one cell may claim
_BROKEN = (
    PackageNotFoundError, zipfile.BadZipFile, zlib.error, LxmlError, ParseError,
    KeyError, ValueError, AttributeError, IndexError, EOFError, NotImplementedError, RuntimeError,
)  # fmt: skip


def parse(data: bytes) -> Document:
    if data.startswith(_OLE):
        raise Unreadable("it is encrypted or an old .doc; save it as .docx without a password")
    try:
        _refuse_bombs(data)
        word = docx.Document(io.BytesIO(data))
        return _document(word)
    except _BROKEN as error:  # what python-docx lets through of its readers when a file is not what it says
        raise Unreadable(f"it is not a Word file or a damaged one ({type(error).__name__})") from None


def _refuse_bombs(data: bytes) -> None:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > _LARGEST:
        raise Unreadable(f"it unpacks to {unpacked >> 20} MiB, more than {_LARGEST >> 20} MiB")


def _document(word: WordFile) -> Document:
    draft = Draft()
    for element in _below(word.element.body, {_PARAGRAPH, _TABLE}):
        _block(draft, element, word)
    return draft.finish(title=word.core_properties.title or "")


def _block(draft: Draft, element: Any, word: WordFile) -> None:
    """A paragraph with the text boxes that hang on it, or a table."""
    if element.tag == _TABLE:
        _table(draft, element)
        return
    text, level = _text(element), _level(Paragraph(element, word))
    if level is None:
        draft.block(text)
    else:
        draft.heading(text, level=level)
    for box in _below(element, {_BOX}):
        for inner in _below(box, {_PARAGRAPH, _TABLE}):
            _block(draft, inner, word)


def _below(element: Any, kinds: set[str]) -> Iterator[Any]:
    """The outermost elements of these kinds, in whatever they are wrapped."""
    for child in element:
        if child.tag in kinds:
            yield child
        elif child.tag not in _UNSEEN and not _is_contents(child):
            yield from _below(child, kinds)


def _is_contents(element: Any) -> bool:
    """A table of contents: it only repeats the headings."""
    gallery = _property(element, "w:sdtPr/w:docPartObj/w:docPartGallery") if element.tag == _CONTROL else None
    return gallery is not None and gallery.get(qn("w:val")) == "Table of Contents"


def _text(element: Any) -> str:
    """The text of a paragraph without its boxes."""
    if element.tag in _TEXT:
        return element.text or ""
    if element.tag in _SIGNS:
        return _SIGNS[element.tag]
    return "".join(_text(child) for child in element if child.tag not in _UNSEEN and child.tag != _BOX)


def _level(paragraph: Paragraph) -> int | None:
    """1 to 6 for headings; Word's own "Title" counts as the top."""
    name = (paragraph.style.name if paragraph.style else None) or ""
    found = _LEVEL.match(name)
    if found:
        return int(found[1]) or 1
    return 1 if name == "Title" else None


def _table(draft: Draft, table: Any) -> None:
    rows = _rows(table)
    if len(rows) == 1:
        draft.block(" | ".join(cell for cell in rows[0] if cell))
    elif rows:
        draft.rows(rows[0], rows[1:])


def _rows(table: Any) -> list[list[str]]:
    """Texts by row and column. A cell's text stays in the first of its columns, and in each of its rows."""
    rows: list[list[str]] = []
    for tr in _below(table, {_ROW}):
        if _property(tr, "w:trPr/w:del") is not None:
            continue
        line = [""] * _number(tr, "w:trPr/w:gridBefore", 0)
        for tc in _below(tr, {_CELL}):
            text, merged = _cell_text(tc), _property(tc, "w:tcPr/w:vMerge")
            if merged is not None and merged.get(qn("w:val")) != "restart" and not text:
                above = rows[-1][len(line)] if rows and len(line) < len(rows[-1]) else ""
                text = above if len(above) <= LONGEST_REPEATED else ""
            line += [text] + [""] * (_number(tc, "w:tcPr/w:gridSpan", 1) - 1)
        rows.append(line)
    return rows


def _cell_text(cell: Any) -> str:
    """Paragraphs with their boxes, and the rows of tables in the cell, each on a line."""
    lines: list[str] = []
    for element in _below(cell, {_PARAGRAPH, _TABLE}):
        if element.tag == _TABLE:
            header, *rows = _rows(element) or [[]]
            lines += [row(header, cells) for cells in rows] or [row((), header)]
        else:
            lines += [_text(element), *(_cell_text(box) for box in _below(element, {_BOX}))]
    return "\n".join(line for line in lines if line.strip())


def _property(element: Any, path: str) -> Any:
    return element.find("/".join(qn(name) for name in path.split("/")))


def _number(element: Any, path: str, default: int) -> int:
    found = _property(element, path)
    value = str(found.get(qn("w:val"))) if found is not None else ""
    return min(max(int(value[:9]), default), _WIDEST_SPAN) if value.isdecimal() else default
