"""Bytes of a text file -> its text, or why that cannot be had. Knows encodings, no formats."""

import codecs

from rag.document import Unreadable

_MARKS = (  # UTF-32 first: its little-endian mark begins like that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ADVICE = "save it as UTF-8"
_MOST_CONTROLS = 0.01  # share of control characters above which a file is not text


def decode(data: bytes, *, declared: str | None = None) -> str:
    """Text by byte order mark, as UTF-8, as the file itself declares, or as Korean CP949."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _checked(_strictly(data, encoding))
    if b"\0" in data:
        raise Unreadable(f"it is binary data, not text (it holds zero bytes); {_ADVICE} if it is text")
    for encoding in ("utf-8", *([declared] if declared else [])):
        try:
            return _checked(data.decode(encoding))
        except (UnicodeDecodeError, LookupError):
            continue
    return _checked(_korean(data))


def _strictly(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise Unreadable(
            f"its byte order mark says {encoding}, but byte {error.start} is not; {_ADVICE}"
        ) from None


def _korean(data: bytes) -> str:
    """CP949, believed only when most of what is not ASCII comes out as Hangul."""
    try:
        text = data.decode("cp949")
    except UnicodeDecodeError:
        text = ""
    other = [char for char in text if char > "\x7f"]
    hangul = sum("\uac00" <= char <= "\ud7a3" for char in other)
    if 2 * hangul <= len(other):
        raise Unreadable(f"its bytes are neither UTF-8, UTF-16 nor Korean CP949; {_ADVICE}")
    return text


def _checked(text: str) -> str:
    controls = sum(text.count(chr(code)) for code in range(32) if chr(code) not in "\t\n\r\f\v\x1b")
    if controls > len(text) * _MOST_CONTROLS:
        raise Unreadable(f"it is binary data, not text ({controls} control characters)")
    return text
