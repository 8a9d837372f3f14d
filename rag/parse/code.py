"""Source code and configuration files: as written, with each top-level definition as a heading."""

import re
from dataclasses import replace

from rag.document import Document, Heading
from rag.parse.draft import Draft, one_line
from rag.parse.encoding import decode

_SUFFIXES = """
.py .pyi .js .mjs .cjs .jsx .ts .tsx .java .kt .kts .scala .go .rs .c .h .cc .cpp .cxx .hpp .hh .cu .m
.cs .fs .vb .rb .php .swift .dart .zig .lua .jl .r .pl .hs .ml .ex .exs .erl .clj .sh .bash .zsh .ps1
.sql .proto .tf .css .scss .json .jsonl .yaml .yml .toml .ini .cfg .xml
"""
SUFFIXES = frozenset(_SUFFIXES.split())

# A line at the left margin that begins a definition in most languages. Every repeat is bounded.
_MODIFIER = (
    r"export|default|public|private|protected|internal|static|abstract|final|sealed|async|unsafe|extern|inline"
    r"|constexpr|virtual|override|data|open|local|pub(?:\([^)\n]{0,40}\))?|template[ \t]*<[^>\n]{0,100}>"
)
_KEYWORD = (
    r"def|class|fn|func|fun|function|struct|interface|enum|trait|impl|object|module|namespace|record|type|union"
    r"|protocol|extension|message|service|macro_rules!|resource"
    r"|create[ \t]+(?:or[ \t]+replace[ \t]+)?(?:table|view|function|index)"
)
_C_FUNCTION = r"[a-z_][\w:<>,*& \t\[\]]{0,80}[ \t*&][\w:~]{1,80}[ \t]*\([^;\n]{0,300}\{[ \t]*$"
_DEFINITION = re.compile(
    rf"^(?:(?:(?:{_MODIFIER})[ \t]+){{0,6}}(?:{_KEYWORD})\b[^\n]*|{_C_FUNCTION})",
    re.MULTILINE | re.IGNORECASE,
)
_ATTACHED = ("@", "#[", "//", "/*", "*", " *", "# ", "--", "template", "///")
_LONGEST_TITLE = 80


def parse(data: bytes) -> Document:
    draft = Draft()
    draft.block(decode(data))
    text = draft.finish(title="").text
    draft.mark([_heading(text, found) for found in _DEFINITION.finditer(text)])
    return replace(draft.finish(title=""), title="")  # the file's name says more than its first class


def _heading(text: str, found: re.Match[str]) -> Heading:
    title = one_line(found[0]).rstrip("{:= ").strip()
    return Heading(title=title[:_LONGEST_TITLE], level=1, start=_with_comments(text, found.start()))


def _with_comments(text: str, start: int) -> int:
    """Where the decorators and comments directly above a definition begin."""
    while start > 0:
        above = text.rfind("\n", 0, start - 1) + 1
        if not text[above : start - 1].startswith(_ATTACHED):
            break
        start = above
    return start
