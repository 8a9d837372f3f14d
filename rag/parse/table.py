"""CSV and TSV: every row repeats the names of its columns, so that a chunk never loses its header."""

import csv
import io

from rag.document import Document, Unreadable
from rag.parse.draft import Draft, clean
from rag.parse.encoding import decode

_DELIMITERS = ",;\t|"
_LARGEST_FIELD = 1 << 30  # characters; the default of 131,072 refuses files that fit in memory


def parse(data: bytes) -> Document:
    text = clean(decode(data))
    csv.field_size_limit(_LARGEST_FIELD)
    try:
        rows = [row for row in csv.reader(io.StringIO(text), delimiter=_delimiter(text)) if any(row)]
    except csv.Error as error:
        raise Unreadable(f"it is not a table of comma-separated values ({error})") from None
    if not rows:
        raise Unreadable("it holds no text")
    draft = Draft()
    if len(rows) == 1:
        draft.block(", ".join(rows[0]))
    else:
        draft.rows(rows[0], rows[1:])
    return draft.finish(title="")


def _delimiter(text: str) -> str:
    """The candidate that the header holds most of."""
    header = text.lstrip("\n").split("\n", 1)[0]
    return max(_DELIMITERS, key=header.count)
