"""Markdown: the source as written, its headings and blocks found by markdown-it; tables become named rows."""

import re
from collections.abc import Collection
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.common.utils import normalizeReference
from markdown_it.token import Token

from rag.document import Document
from rag.parse.draft import Draft, clean
from rag.parse.encoding import decode

_FRONT_MATTER = re.compile(
    r"\A(---|\+\+\+)[ \t]*\n(.*?)^(?:\1|\.\.\.)[ \t]*(?:\n|\Z)", re.DOTALL | re.MULTILINE
)
#: A line of YAML or TOML: a key, what is indented below one, a list item, a bracket, a comment.
_FIELD = re.compile(r"""["']?[\w.-]+["']?[ \t]*[:=](?:\s.*)?""")
_BELOW_FIELD = re.compile(r"[ \t].*|-(?:[ \t].*)?|[\[\]{}#].*|")
_TITLE = re.compile(r"""^title[ \t]*[:=][ \t]*+(?![>|])["']?(.*?)["']?[ \t]*$""", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\]\[]*)\](?:\([^()\s]*(?:\s[^()]*)?\)|\[([^\]\[]*)\])")
_EMPHASIS = re.compile(r"(?<!\w)__(\S|\S.{0,200}?\S)__(?!\w)")


def parse(data: bytes) -> Document:
    text, title = _without_front_matter(clean(decode(data)))
    lines = text.split("\n")
    blocks, references = _blocks(text)
    draft, at = Draft(), 0
    for block in blocks:
        first = block[0]
        begin, end = first.map or (at, at)
        draft.block("\n".join(lines[at:begin]))  # what is in no block: definitions of references
        at = max(at, end)
        if first.type == "heading_open":
            plain = _plain(block[1].content, references)
            draft.heading(plain, level=int(first.tag[1:]), source="\n".join(lines[begin:end]))
        elif first.type == "table_open":
            names = [_plain(name, references) for name in _cells(lines[begin])]
            draft.rows(names, [_cells(line) for line in lines[begin + 2 : end]])
        elif first.type in ("bullet_list_open", "ordered_list_open"):
            _items(draft, block, lines)
        else:
            draft.block("\n".join(lines[begin:end]))
    draft.block("\n".join(lines[at:]))
    return draft.finish(title=title)


def _without_front_matter(text: str) -> tuple[str, str]:
    """The text below YAML or TOML front matter, and the title that it gives; rules may enclose text too."""
    found = _FRONT_MATTER.match(text)
    fields = [line for line in found[2].split("\n") if not _BELOW_FIELD.fullmatch(line)] if found else []
    if not found or not fields or not all(map(_FIELD.fullmatch, fields)):
        return text, ""
    title = _TITLE.search(found[2])
    return text[found.end() :], title[1] if title else ""


def _blocks(text: str) -> tuple[list[list[Token]], Collection[str]]:
    """Tokens of each outermost block, and the labels of references.

    Inline syntax is not read: it is slow and the source is kept.
    """
    parser = MarkdownIt("commonmark").enable("table").disable(["inline", "text_join"])
    blocks: list[list[Token]] = []
    known: dict = {}
    for token in parser.parse(text, known):
        if token.level == 0 and token.nesting >= 0:
            blocks.append([])
        blocks[-1].append(token)
    return blocks, known.get("references", {})


def _items(draft: Draft, block: list[Token], lines: list[str]) -> None:
    """Each outermost list item is a place to cut."""
    _, end = block[0].map or (0, 0)
    items = [token for token in block if token.type == "list_item_open" and token.level == 1]
    starts = [token.map[0] for token in items if token.map]
    gap = "\n\n"
    for first, last in pairwise([*starts, end]):
        draft.block("\n".join(lines[first:last]), gap=gap)
        gap = "\n"


def _cells(line: str) -> list[str]:
    """The cells of a row as written; markdown-it drops those beyond the header's."""
    inner = line.strip().removeprefix("|")
    if inner.endswith("|") and not inner.endswith("\\|"):
        inner = inner[:-1]
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner)]


def _plain(text: str, references: Collection[str]) -> str:
    """A heading or name without emphasis, code marks and link targets."""

    def shown(link: re.Match[str]) -> str:
        is_link = link[2] is None or normalizeReference(link[2] or link[1]) in references
        return link[1] if is_link else link[0]

    return _EMPHASIS.sub(r"\1", re.sub(r"\*\*|`", "", _LINK.sub(shown, text))).strip()
