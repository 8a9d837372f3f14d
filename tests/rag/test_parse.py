"""Each format gives the text a reader sees, with headings, pages and cuts; bad files say what is wrong."""

import contextlib
import io
import random
import zipfile
from pathlib import Path

import docx
import pypdf
import pytest
from fpdf import FPDF

from rag.document import Document, Unreadable
from rag.parse import SUFFIXES, parse


def read(name: str, data: bytes | str) -> Document:
    return parse(Path(name), data.encode() if isinstance(data, str) else data)


def headings(document: Document) -> list[tuple[int, str]]:
    for heading in document.headings:
        line = document.text[heading.start :].split("\n", 1)[0]
        assert heading.title.split()[0] in line
    return [(heading.level, heading.title) for heading in document.headings]


def pdf_of(*pages: str, **options: str) -> bytes:
    pdf = FPDF(format=(148, 210))
    for page in pages:
        pdf.add_page()
        pdf.set_font("Helvetica", size=11)
        if page:
            pdf.multi_cell(0, 6, page)
    if options:
        pdf.set_title(options["title"])
    return bytes(pdf.output())


def word_of(build) -> bytes:
    word, target = docx.Document(), io.BytesIO()
    build(word)
    word.save(target)
    return target.getvalue()


# --- text and encodings


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "cp949"])
def test_korean_text_is_read_in_the_encodings_it_comes_in(encoding: str) -> None:
    document = read("안내.txt", "등대는 안개 속에서도 빛난다.\r\n등대지기는 잔다.".encode(encoding))
    assert document.text == "등대는 안개 속에서도 빛난다.\n등대지기는 잔다."
    assert document.title == "안내"


def test_decomposed_korean_is_composed() -> None:
    assert read("a.txt", "\u1103\u1173\u11bc").text == "등"


def test_underlined_lines_of_plain_text_are_headings() -> None:
    document = read("a.txt", "Lamps\n=====\n\nLit.\n\nOil\n---\n\nDry.")
    assert headings(document) == [(1, "Lamps"), (2, "Oil")]
    assert document.title == "Lamps"


def test_control_characters_and_lone_marks_do_not_reach_the_text() -> None:
    assert read("a.txt", "lamp\x07 \ufeffoil" + " dry" * 100).text.startswith("lamp oil")


# --- markdown


def test_markdown_headings_are_found_but_not_inside_code_fences() -> None:
    source = (
        "# Lamps\n\n```sh\n# not a heading\n```\n\n## The **big** [lens](x.md)\n\nClear\n\nOil\n---\n\nDry."
    )
    document = read("a.md", source)
    assert headings(document) == [(1, "Lamps"), (2, "The big lens"), (2, "Oil")]
    assert "# not a heading" in document.text


def test_front_matter_gives_the_title_and_is_not_text() -> None:
    document = read("a.md", '---\ntitle: "Night watch"\ntags: [a]\n---\n\nText.')
    assert (document.title, document.text) == ("Night watch", "Text.")


def test_markdown_table_rows_repeat_the_column_names() -> None:
    document = read("a.md", "| City | Lamp |\n|---|---|\n| Skarnvik | red |\n| Busan | |\n")
    assert document.text == "City: Skarnvik; Lamp: red\nCity: Busan"


def test_list_items_are_places_to_cut() -> None:
    document = read("a.md", "Before.\n\n- one\n- two\n  more\n")
    assert [document.text[start:].split("\n")[0] for start in document.breaks] == [
        "Before.",
        "- one",
        "- two",
    ]


# --- html


def test_html_gives_what_a_reader_sees() -> None:
    document = read(
        "a.html",
        "<html><head><title>Site</title><style>b{}</style></head><body><nav>Go</nav><h1>The <b>lamp</b></h1>"
        "<p>One<br>two <i>three</i>.<!-- not this --></p><script>no()</script><ul><li>a</li><li>b</li></ul>"
        "<h3>Oil</h3>tail",
    )
    assert document.text == "The lamp\n\nOne\ntwo three.\n- a\n- b\n\nOil\n\ntail"
    assert headings(document) == [(1, "The lamp"), (3, "Oil")]
    assert document.title == "The lamp"


def test_html_table_rows_repeat_the_column_names() -> None:
    rows = "<tr><th>City<th>Lamp<th>Oil</tr><tr><td colspan=2>Skarnvik<td>dry</tr><tr><td>Busan<td>red</tr>"
    assert read("a.html", f"<table>{rows}</table>").text == "City: Skarnvik; Oil: dry\nCity: Busan; Lamp: red"
    pairs = "<tr><th>City<td>Busan</tr><tr><th>Lamp<td>red</tr>"
    assert read("a.html", f"<table>{pairs}</table>").text == "City: Busan\nLamp: red"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            "<tr><th>City<th>Lamp<tr><td rowspan=2>Busan<td>red<tr><td>blue<tr><td>Ulsan<td>dry",
            "City: Busan; Lamp: red\nCity: Busan; Lamp: blue\nCity: Ulsan; Lamp: dry",
        ),
        (
            "<tr><th>City<th>Lamp<th>Oil<tr><td>a<td rowspan=3 colspan=2>b<tr><td>c<tr><td>d<tr><td>e<td>f",
            "City: a; Lamp: b\nCity: c; Lamp: b\nCity: d; Lamp: b\nCity: e; Lamp: f",
        ),
        (
            "<tr><th rowspan=2>City<th colspan=2>Lamp<tr><th>day<th>night<tr><td>Busan<td>1<td>2",
            "City: Busan; Lamp day: 1; Lamp night: 2",
        ),
        (
            "<tr><th>City<td>Busan<tr><th rowspan=2>Lamp<td>red<tr><td>blue",
            "City: Busan\nLamp: red\nLamp: blue",
        ),
        ("<tr><td rowspan=0>a<td>b<tr><td>c<tr><td>d", "a; b\na; c\na; d"),
        (f"<tr><td rowspan=2>{'long ' * 30}<td>b<tr><td>c", f"{'long ' * 30}".strip() + "; b\nc"),
        ("<tr><td rowspan=x colspan=-1>a<td colspan=99999>b", "a; b"),
        ("<tr><th>City<th>Lamp", "City; Lamp"),
        ("<tr><th>City<th>Lamp<tr><td><td>", "City; Lamp"),
        ("<caption>Lamps</caption>beside<tr><td>a", "beside\n\nLamps\n\na"),
    ],
)
def test_html_cells_that_span_stay_under_their_names(rows, text) -> None:
    document = read("a.html", f"<table>{rows}</table>")
    if "beside" in rows:  # where text beside the cells goes is the browser's choice: above the table
        assert sorted(document.text.split()) == sorted(text.split())
    else:
        assert document.text == text
    layout = read("a.html", f"<table><tr><td><h1>Top</h1><table>{rows}</table></td></tr></table>")
    assert layout.text == f"Top\n\n{document.text}"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "<form>Sign <p>here</p><select><option>no</select><button>Go</button></form>after",
            "Sign\n\nhere\n\nafter",
        ),
        ("<form><table><tr><th>a<th>b<tr><td>1<td>2</table></form>", "a: 1; b: 2"),
        ("<pre>one<br>two\n  <b>three</b></pre>", "one\ntwo\n  three"),
        ("<ul><li></li></ul>after", "after"),
        ("<ul><li> </li><li>a<ul><li>b</li></ul>c</li></ul><p>after", "- a\n- b\n\nc\n\nafter"),
    ],
)
def test_html_forms_code_and_empty_items_lose_nothing(source, text) -> None:
    assert read("a.html", source).text == text


def test_html_declared_encodings_are_believed_when_it_is_not_utf8() -> None:
    assert read("a.html", b'<meta charset="latin-1"><p>caf\xe9').text == "café"
    assert read("a.html", b'<meta charset="euc-kr"><p>' + "등대".encode("euc-kr")).text == "등대"


def test_deeply_nested_html_is_read() -> None:
    assert "deep" in read("a.html", "<div>" * 3_000 + "deep").text


# --- pdf


def test_pdf_pages_begin_at_their_offsets() -> None:
    document = read("a.pdf", pdf_of("First lamp.", "", "Second lamp.", title="Lamps"))
    assert document.title == "Lamps"
    assert [(number, document.text[start : start + 6]) for start, number in document.pages] == [
        (1, "First "),
        (3, "Second"),
    ]


def test_a_sentence_that_runs_over_a_page_is_not_broken_into_paragraphs() -> None:
    document = read("a.pdf", pdf_of("The lamp is lit by", "the keeper at dusk."))
    assert document.text == "The lamp is lit by\nthe keeper at dusk."


def test_encrypted_pdf_is_refused_with_the_remedy() -> None:
    writer = pypdf.PdfWriter(clone_from=pypdf.PdfReader(io.BytesIO(pdf_of("secret"))))
    writer.encrypt("key", algorithm="RC4-128")
    target = io.BytesIO()
    writer.write(target)
    with pytest.raises(Unreadable, match="encrypted; save a copy without the password"):
        read("a.pdf", target.getvalue())


def test_scanned_pdf_is_refused_with_the_remedy() -> None:
    with pytest.raises(Unreadable, match="none of its 2 pages has text: it is scanned; run it through OCR"):
        read("a.pdf", pdf_of("", ""))


# --- docx


def test_word_keeps_body_order_headings_and_table_headers() -> None:
    def build(word) -> None:
        word.add_heading("Lamps", level=1)
        table = word.add_table(rows=3, cols=2)
        for cell, text in zip(
            table._cells, ["City", "Lamp", "Skarnvik", "red", "Busan", "blue"], strict=True
        ):
            cell.text = text
        word.add_heading("Oil", level=2)
        word.add_paragraph("Dry.")

    document = read("a.docx", word_of(build))
    assert document.text == "Lamps\n\nCity: Skarnvik; Lamp: red\nCity: Busan; Lamp: blue\n\nOil\n\nDry."
    assert headings(document) == [(1, "Lamps"), (2, "Oil")]


def test_word_bomb_is_refused_before_it_is_unpacked() -> None:
    target = io.BytesIO()
    with (
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("word/x", "w") as part,
    ):
        for _ in range(300):
            part.write(b"\0" * (1 << 20))
    with pytest.raises(Unreadable, match="unpacks to 300 MiB"):
        read("a.docx", target.getvalue())


def test_old_or_encrypted_word_is_refused_with_the_remedy() -> None:
    with pytest.raises(Unreadable, match=r"encrypted or an old \.doc; save it as .docx"):
        read("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600))


# --- csv


def test_csv_rows_repeat_the_column_names() -> None:
    document = read("a.csv", 'city;lamp;note\nSkarnvik;red;"old; ""big"""\nBusan;;dry\n\n')
    assert document.text == 'city: Skarnvik; lamp: red; note: old; "big"\ncity: Busan; note: dry'
    assert len(document.breaks) == 2


def test_csv_field_of_a_megabyte_is_read() -> None:
    assert len(read("a.csv", "a,b\n" + "x" * 1_000_000 + ",1").text) > 1_000_000


# --- source code


def test_code_definitions_are_headings_with_their_comments_and_decorators() -> None:
    lamp = "# lights it\n@cached\ndef lamp(a: int) -> int:\n    def inner(): ...\n"
    source = f"import os\n\n{lamp}\n\nclass Oil:\n    x = 1\n"
    document = read("lamp.py", source)
    assert document.title == "lamp"
    assert [heading.title for heading in document.headings] == ["def lamp(a: int) -> int", "class Oil"]
    assert document.text[document.headings[0].start :].startswith("# lights it")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.rs", "pub fn lamp() -> u8 {"),
        ("a.go", "func (l *Lamp) Light() error {"),
        ("a.ts", "export async function light() {"),
        ("a.c", "static int light(struct lamp *lamp) {"),
        ("a.sql", "CREATE TABLE lamps ("),
    ],
)
def test_definitions_are_found_in_many_languages(name: str, line: str) -> None:
    assert [one.title for one in read(name, f"\n// x\n{line}\n  body\n}}\n").headings] == [line.rstrip(" {")]


# --- bad input


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_no_format_fails_on_junk_truncation_or_nothing_other_than_as_unreadable(suffix: str) -> None:
    junk = random.Random(7).randbytes(5_000)
    good = {".pdf": pdf_of("Lamp."), ".docx": word_of(lambda word: word.add_paragraph("Lamp."))}.get(
        suffix, junk
    )
    for data in (
        junk,
        good[: len(good) // 2],
        b"",
        b"  \n",
        b"PK\x03\x04" + junk,
        b"\x89PNG\r\n\x1a\n" + junk,
    ):
        with pytest.raises(Unreadable):
            read(f"a{suffix}", data)


def test_broken_word_files_are_unreadable_wherever_they_are_broken() -> None:
    good = word_of(lambda word: word.add_paragraph("Lamp."))
    chance = random.Random(3)
    for _ in range(40):
        data = bytearray(good)
        for _ in range(20):
            data[chance.randrange(len(data))] = chance.randrange(256)
        with contextlib.suppress(Unreadable):
            assert read("a.docx", bytes(data)).text


def test_unknown_types_and_false_byte_order_marks_are_named() -> None:
    with pytest.raises(Unreadable, match=r"'.xyz' are not supported"):
        read("a.xyz", "text")
    with pytest.raises(Unreadable, match="byte order mark says utf-8"):
        read("a.txt", b"\xef\xbb\xbfab\xff")


def test_western_bytes_are_not_taken_for_korean() -> None:
    with pytest.raises(Unreadable, match="neither UTF-8"):
        read("a.txt", "caféa élan naïveté".encode("latin-1"))


@pytest.mark.parametrize("suffix", [".txt", ".md", ".html", ".csv", ".py"])
@pytest.mark.parametrize("unit", ["x", "lamp. ", "[(", "|", "> ", "`*"])
def test_a_line_of_ten_megabytes_is_one_document(suffix: str, unit: str) -> None:
    size = 10_000_000 if unit == "x" else 200_000
    line = "start " + unit * (size // len(unit)) + " end"
    assert "start" in read(f"a{suffix}", line).text
