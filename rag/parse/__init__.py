"""Bytes of a file -> Document, one module a format."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from rag.document import Document, Unreadable
from rag.parse.code import SUFFIXES as CODE_SUFFIXES

PARSER_VERSION = "3"
"""Raised whenever the same bytes give another text or other headings: collections are then parsed anew."""

_MODULES = {
    **dict.fromkeys(CODE_SUFFIXES, "code"),
    **dict.fromkeys((".txt", ".text", ".log", ".rst"), "plain"),
    **dict.fromkeys((".md", ".markdown"), "markdown"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "web"),
    **dict.fromkeys((".csv", ".tsv"), "table"),
    ".pdf": "pdf",
    ".docx": "word",
}

SUFFIXES: frozenset[str] = frozenset(_MODULES)


def parse(path: Path, data: bytes) -> Document:
    """The document in `data`; the format is told by the suffix of `path`, which is not opened."""
    module = _MODULES.get(path.suffix.lower())
    if module is None:
        raise Unreadable(f"files of type {path.suffix or path.name!r} are not supported")
    if not data.strip():
        raise Unreadable("it is empty")
    read: Callable[[bytes], Document] = import_module(f"rag.parse.{module}").parse
    document = read(data)
    return document if document.title else replace(document, title=path.stem)
