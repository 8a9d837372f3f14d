"""Plain text: paragraphs between blank lines; underlined lines are headings."""

import re

from rag.document import Document, Heading
from rag.parse.draft import Draft, one_line
from rag.parse.encoding import decode

_UNDERLINED = re.compile(r"^(\S[^\n]{0,118})\n(={3,}|-{3,})[ \t]*$", re.MULTILINE)


def parse(data: bytes) -> Document:
    draft = Draft()
    start = draft.block(decode(data))
    text = draft.finish(title="").text
    headings = [
        Heading(title=one_line(found[1]), level=1 if found[2][0] == "=" else 2, start=start + found.start())
        for found in _UNDERLINED.finditer(text)
    ]
    draft.mark(headings)
    return draft.finish(title="")
