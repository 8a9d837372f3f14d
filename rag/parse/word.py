"""Word (.docx): paragraphs, headings and tables in the order of the body."""

import io
import re
import zipfile
import zlib
from xml.etree.ElementTree import ParseError

import docx
from docx.document import Document as WordFile
from docx.opc.exceptions import PackageNotFoundError
from docx.table import Table, _Row
from docx.text.paragraph import Paragraph
from lxml.etree import LxmlError

from rag.document import Document, Unreadable
from rag.parse.draft import Draft

_OLE = b"\xd0\xcf\x11\xe0"  # the container of old .doc files and of encrypted .docx
_LARGEST = 256 << 20  # bytes unpacked, all parts together
_LEVEL = re.compile(r"(?:heading|제목) ?(\d)$", re.IGNORECASE)
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
    for element in word.iter_inner_content():
        if isinstance(element, Table):
            _table(draft, element)
            continue
        level = _level(element)
        if level is None:
            draft.block(element.text)
        else:
            draft.heading(element.text, level=level)
    return draft.finish(title=word.core_properties.title or "")


def _level(paragraph: Paragraph) -> int | None:
    """1 to 6 for headings; Word's own "Title" counts as the top."""
    name = (paragraph.style.name if paragraph.style else None) or ""
    found = _LEVEL.match(name)
    if found:
        return int(found[1]) or 1
    return 1 if name == "Title" else None


def _table(draft: Draft, table: Table) -> None:
    rows = [_cells(row) for row in table.rows]
    if len(rows) == 1:
        draft.block(" | ".join(cell for cell in rows[0] if cell))
    else:
        draft.rows(rows[0], rows[1:])


def _cells(row: _Row) -> list[str]:
    """A merged cell is given once a column by Word; its text stays in the first."""
    texts: list[str] = []
    before = None
    for cell in row.cells:
        texts.append("" if cell._tc is before else cell.text)
        before = cell._tc
    return texts
