"""Markdown: the source as written, its headings and blocks found by markdown-it; tables become named rows."""

import re

from markdown_it import MarkdownIt
from markdown_it.token import Token

from rag.document import Document
from rag.parse.draft import Draft, clean
from rag.parse.encoding import decode

_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
_TITLE = re.compile(r"""^title:[ \t]*["']?(.*?)["']?[ \t]*$""", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]\[]*)\]\([^()\s]*(?:\s[^()]*)?\)")


def parse(data: bytes) -> Document:
    text, title = _without_front_matter(clean(decode(data)))
    lines = text.split("\n")
    draft = Draft()
    for block in _blocks(text):
        first = block[0]
        begin, end = first.map or (0, 0)
        source = "\n".join(lines[begin:end])
        if first.type == "heading_open":
            draft.heading(_plain(block[1].content), level=int(first.tag[1:]), source=source)
        elif first.type == "table_open":
            header, *rows = _cells(block)
            draft.rows(header, rows)
        elif first.type in ("bullet_list_open", "ordered_list_open"):
            _items(draft, block, lines)
        else:
            draft.block(source)
    return draft.finish(title=title)


def _without_front_matter(text: str) -> tuple[str, str]:
    """The text below YAML front matter, and the title that it gives."""
    found = _FRONT_MATTER.match(text)
    if not found:
        return text, ""
    title = _TITLE.search(found[1])
    return text[found.end() :], title[1] if title else ""


def _blocks(text: str) -> list[list[Token]]:
    """Tokens of each outermost block. Inline syntax is not read: it is slow and the source is kept."""
    parser = MarkdownIt("commonmark").enable("table").disable(["inline", "text_join"])
    blocks: list[list[Token]] = []
    for token in parser.parse(text):
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
    return blocks


def _items(draft: Draft, block: list[Token], lines: list[str]) -> None:
    """Each outermost list item is a place to cut."""
    gap = "\n\n"
    for token in block:
        if token.type == "list_item_open" and token.level == 1 and token.map:
            draft.block("\n".join(lines[token.map[0] : token.map[1]]), gap=gap)
            gap = "\n"


def _cells(block: list[Token]) -> list[list[str]]:
    rows: list[list[str]] = []
    for before, token in zip([None, *block], block, strict=False):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and before and before.type in ("th_open", "td_open"):
            rows[-1].append(_plain(token.content))
    return rows


def _plain(text: str) -> str:
    """A heading or cell without emphasis, code marks and link targets."""
    return re.sub(r"\*\*|__|`", "", _LINK.sub(r"\1", text)).strip()
