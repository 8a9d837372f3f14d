"""Chunks cover the document, fit their sizes and are cut where a reader would cut."""

import itertools
import random
import re

import pytest

from rag.chunk import Chunk, InvalidChunking, chunk
from rag.document import Document, Heading


def spans(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\w{1,6}|[^\w\s]", text)]


def spaced_spans(text: str) -> list[tuple[int, int]]:
    """As byte-level vocabularies count: the space belongs to the word after it."""
    return [match.span() for match in re.finditer(r"\s?\w+|\s?[^\w\s]|\s", text)]


def cut(document: Document | str, *, chunk_tokens=40, overlap=8, window_tokens=15, by=spans) -> list[Chunk]:
    if isinstance(document, str):
        document = Document(text=document, title="t")
    return chunk(document, by, chunk_tokens=chunk_tokens, overlap=overlap, window_tokens=window_tokens)


def marked(text: str) -> Document:
    """A document whose lines beginning with # are headings."""
    headings = [
        Heading(title=match[2], level=len(match[1]), start=match.start())
        for match in re.finditer(r"^(#+) (.*)$", text, re.MULTILINE)
    ]
    return Document(text=text, title="t", headings=tuple(headings))


def random_document(seed: int) -> Document:
    chance = random.Random(seed)
    words = [
        "lamp",
        "등대는",
        "fog-horn",
        "🦀",
        "x" * 250,
        "3.14",
        "e.g.",
        "안개.",
        "end.",
        "why?",
        "灯台。",
        "J.",
    ]
    parts: list[str] = []
    for _ in range(chance.randrange(1, 60)):
        if chance.random() < 0.15:
            parts.append(f"\n\n{'#' * chance.randrange(1, 4)} {chance.choice(words)}\n\n")
        line = " ".join(chance.choices(words, k=chance.randrange(0, 30)))
        parts.append(line + chance.choice([" ", "\n", "\n\n", "", "\t \r\n"]))
    return marked("".join(parts))


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("by", [spans, spaced_spans])
def test_every_token_is_in_a_chunk_and_a_window_and_all_sizes_hold(seed: int, by) -> None:
    document = random_document(seed)
    chunks = cut(document, by=by)
    text = document.text
    chunked, windowed = bytearray(len(text)), bytearray(len(text))
    for one in chunks:
        piece = text[one.start : one.end]
        assert piece
        assert piece == piece.strip()
        assert one.n_tokens <= 40
        chunked[one.start : one.end] = b"\1" * len(piece)
        assert [*one.windows] == sorted(one.windows)
        for start, end in one.windows:
            assert one.start <= start < end <= one.end
            assert len([1 for _ in by(text[start:end])]) <= 15
            windowed[start:end] = b"\1" * (end - start)
    missing = [i for i, char in enumerate(text) if not char.isspace() and not (chunked[i] and windowed[i])]
    assert missing == []
    assert [one.start for one in chunks] == sorted({one.start for one in chunks})


@pytest.mark.parametrize("seed", range(20))
def test_neighbours_share_no_more_than_the_overlap(seed: int) -> None:
    document = random_document(seed)
    chunks = cut(document)
    for before, after in itertools.pairwise(chunks):
        shared = document.text[after.start : before.end]
        assert len([span for span in spans(shared) if span[1] - span[0] < 100]) <= 8


def test_cutting_the_same_document_twice_gives_the_same_chunks() -> None:
    assert cut(random_document(3)) == cut(random_document(3))


def test_nothing_but_white_space_gives_no_chunks() -> None:
    assert cut(" \n\t ") == []


def test_small_neighbouring_sections_are_one_chunk_under_their_common_heading() -> None:
    text = "# Leave\n\n## Parental\n\nTwenty weeks.\n\n## Sick\n\nTen days.\n\n## Storm\n\nThree days."
    (only,) = cut(marked(text))
    assert only.heading == "Leave"
    assert text[only.start : only.end] == text


def test_a_full_section_begins_its_own_chunk_with_the_whole_heading_path() -> None:
    body = "The lamp is lit at dusk. " * 5
    text = f"# Lamps\n\n{body}\n\n## Lenses\n\n{body}"
    assert [one.heading for one in cut(marked(text), chunk_tokens=45)] == ["Lamps", "Lamps > Lenses"]
    assert text[cut(marked(text), chunk_tokens=45)[1].start :].startswith("## Lenses")


def test_a_heading_is_never_left_alone_at_the_end_of_a_chunk() -> None:
    body = "The lamp is lit at dusk. " * 4
    text = "\n\n".join(f"# Why {n}?\n\n{body}" for n in range(9))
    for size in range(20, 60):
        for one in cut(marked(text), chunk_tokens=size, overlap=4):
            assert not re.search(r"# Why \d\?$", text[one.start : one.end])


def test_long_text_is_cut_between_sentences_and_the_overlap_begins_with_one() -> None:
    text = "The keeper lights the lamp at dusk. " * 30
    for one in cut(text):
        assert text[one.start : one.end].startswith("The keeper")
        assert text[one.start : one.end].endswith("dusk.")


def test_korean_and_cjk_full_stops_end_sentences() -> None:
    korean = "등대지기는 해질녘에 등을 켭니다. " * 30
    assert all(korean[one.start : one.end].endswith("켭니다.") for one in cut(korean))
    chinese = "守灯人在黄昏点灯。" * 60
    by_character = [(i, i + 1) for i in range(len(chinese))]
    assert all(chinese[one.end - 1] == "。" for one in cut(chinese, by=lambda _: by_character))


def test_abbreviations_and_initials_do_not_end_sentences() -> None:
    text = "Ask Mr J. Tolland about e.g. the spare lens before the tide turns tonight please. " * 20
    assert all(text[one.start :].startswith("Ask") for one in cut(text, overlap=0))


def test_blocks_named_by_the_parser_are_preferred_to_sentences() -> None:
    rows = [f"station: {n}; lamp: red. Lit. Dry." for n in range(20)]
    text = "\n".join(rows)
    breaks = tuple(text.index(row) for row in rows)
    assert all(
        text[one.start :].startswith("station:")
        for one in cut(Document(text=text, title="t", breaks=breaks), overlap=0)
    )


def test_a_chunk_knows_the_page_on_which_it_begins() -> None:
    page = "The keeper lights the lamp at dusk. " * 8
    document = Document(text=page + page, title="t", pages=((0, 1), (len(page), 2)))
    pages = [one.page for one in cut(document, overlap=0)]
    assert pages[0] == 1
    assert pages[-1] == 2
    assert document.page_at(len(page) - 1) == 1


def test_a_short_rest_is_not_left_as_a_tiny_chunk() -> None:
    for words in range(41, 60):
        assert min(one.n_tokens for one in cut("lamp " * words, overlap=0)) >= 10


@pytest.mark.parametrize(
    "line", ["x" * 10_000_000, "lamp " * 2_000_000, "." * 10_000_000, "ab. c " * 1_600_000]
)
def test_ten_megabytes_on_one_line_are_cut_with_one_tokenization(line: str) -> None:
    calls = 0

    def by_step(text: str) -> list[tuple[int, int]]:
        nonlocal calls
        calls += 1
        return [(0, len(text))] if " " not in text else [(i, i + 5) for i in range(0, len(text), 5)]

    chunks = cut(line, chunk_tokens=512, overlap=64, window_tokens=254, by=by_step)
    assert calls == 1
    assert all(one.end - one.start <= 5 * 512 + 5 for one in chunks)
    assert len(chunks) < 40_000


@pytest.mark.parametrize(
    ("chunk_tokens", "overlap", "window_tokens"), [(1, 0, 10), (300, 150, 10), (300, -1, 10), (300, 10, 0)]
)
def test_impossible_sizes_are_refused_with_the_number(
    chunk_tokens: int, overlap: int, window_tokens: int
) -> None:
    with pytest.raises(InvalidChunking):
        cut("text", chunk_tokens=chunk_tokens, overlap=overlap, window_tokens=window_tokens)
