"""PDF: the text layer of each page, with the outline's entries as headings; images of text are not read."""

import re
import threading
from dataclasses import replace

import pypdfium2

from rag.document import Document, Heading, Unreadable
from rag.parse.draft import Draft, clean, one_line

_pdfium = threading.Lock()  # the library is not safe for threads

_SOFT_HYPHEN = re.compile("[\ufffe\x02\u00ad]\\s*")  # pdfium's mark for a word broken at the line's end
_FINISHED = tuple(".!?…。:;)”’\"'")
_SHORT_LINE = 0.75  # of the longest: a line that ends a sentence there ends the paragraph


def parse(data: bytes) -> Document:
    with _pdfium:
        pdf = _open(data)
        try:
            return _document(pdf)
        except pypdfium2.PdfiumError as error:
            raise Unreadable(f"it is a damaged PDF ({error})") from None
        finally:
            pdf.close()


def _open(data: bytes) -> pypdfium2.PdfDocument:
    try:
        return pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "assword" in str(error):
            raise Unreadable("it is encrypted; save a copy without the password") from None
        if "ecurity" in str(error):
            raise Unreadable("it is encrypted in a way that cannot be opened; save a copy without") from None
        raise Unreadable(f"it is not a PDF or a damaged one ({error})") from None


def _document(pdf: pypdfium2.PdfDocument) -> Document:
    draft = Draft()
    starts: dict[int, tuple[int, str]] = {}
    gap = ""
    for index in range(len(pdf)):
        text = _paragraphs(_page_text(pdf, index))
        start = draft.page(index + 1, text, gap=gap)
        starts[index] = (start, text)
        if text:
            gap = "\n\n" if text.endswith(_FINISHED) else "\n"
    empty = sum(not text for _, text in starts.values())
    if empty == len(pdf):
        raise Unreadable(f"none of its {len(pdf)} pages has text: it is scanned; run it through OCR first")
    draft.mark(_outline(pdf, starts))
    document = draft.finish(title=pdf.get_metadata_dict().get("Title", ""))
    return replace(document, note=f"{empty} of {len(pdf)} pages have no text: run OCR" if empty else "")


def _page_text(pdf: pypdfium2.PdfDocument, index: int) -> str:
    page = pdf[index]
    try:
        layer = page.get_textpage()
        try:
            return clean(_SOFT_HYPHEN.sub("", layer.get_text_bounded())).strip()
        finally:
            layer.close()
    finally:
        page.close()


def _paragraphs(text: str) -> str:
    """A blank line after each paragraph: pdfium gives lines only."""
    lines = [line.rstrip() for line in text.split("\n")]
    longest = max((len(line) for line in lines), default=0)
    parts: list[str] = []
    for line in lines:
        parts.append(line)
        if line.endswith(_FINISHED) and len(line) < longest * _SHORT_LINE:
            parts.append("")
    return "\n".join(parts).strip()


def _outline(pdf: pypdfium2.PdfDocument, starts: dict[int, tuple[int, str]]) -> list[Heading]:
    """Outline entries whose title stands on a line of the page that they point to."""
    found: dict[int, Heading] = {}
    for mark in pdf.get_toc(max_depth=6):
        title = one_line(clean(mark.get_title()))
        target = mark.get_dest()
        index = target.get_index() if target else None
        if not title or index is None or index not in starts:
            continue
        start, text = starts[index]
        words = r"\s+".join(re.escape(word) for word in title.split())
        line = re.search(rf"^[^\n]{{0,12}}?{words}[ \t]*$", text, re.MULTILINE)
        if line:
            at = start + line.start()
            found[at] = Heading(title=title, level=min(mark.level + 1, 6), start=at)
    return list(found.values())
