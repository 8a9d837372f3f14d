"""What Word wraps text in (tracked changes, content controls, boxes, nested tables) loses nothing."""

import io
from pathlib import Path

import docx
import pytest
from docx.oxml import parse_xml

from rag.document import Document
from rag.parse import parse

_SCHEMAS = "http://schemas.openxmlformats.org"
_NAMES = f"""
xmlns:w="{_SCHEMAS}/wordprocessingml/2006/main" xmlns:m="{_SCHEMAS}/officeDocument/2006/math"
xmlns:r="{_SCHEMAS}/officeDocument/2006/relationships"
xmlns:mc="{_SCHEMAS}/markup-compatibility/2006"
xmlns:wps="http://schemas.microsoft.com/office/word/2010/wordprocessingShape"
"""


def read(body: str) -> Document:
    word, target = docx.Document(), io.BytesIO()
    for element in parse_xml(f"<w:body {_NAMES}>{body}</w:body>"):
        word.element.body.insert(len(word.element.body) - 1, element)
    word.save(target)
    return parse(Path("a.docx"), target.getvalue())


def run(text: str) -> str:
    return f'<w:r><w:t xml:space="preserve">{text}</w:t></w:r>'


def paragraph(*runs: str, style: str = "") -> str:
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{properties}{''.join(runs)}</w:p>"


def control(inner: str, properties: str = "") -> str:
    return f"<w:sdt><w:sdtPr>{properties}</w:sdtPr><w:sdtContent>{inner}</w:sdtContent></w:sdt>"


def cell(inner: str, properties: str = "") -> str:
    return f"<w:tc><w:tcPr>{properties}</w:tcPr>{inner}</w:tc>"


def cells(*texts: str) -> str:
    return "".join(cell(paragraph(run(text))) for text in texts)


def table(*rows: str) -> str:
    grid = "<w:tblPr/><w:tblGrid><w:gridCol/><w:gridCol/></w:tblGrid>"
    return f"<w:tbl>{grid}{''.join(f'<w:tr>{row}</w:tr>' for row in rows)}</w:tbl>"


INSERTED = f'<w:ins w:id="1">{run("new")}</w:ins>'
DELETED = '<w:del w:id="2"><w:r><w:delText>old</w:delText></w:r></w:del>'
MOVED = f'<w:moveFrom w:id="3">{run("there")}</w:moveFrom><w:moveTo w:id="4">{run("here")}</w:moveTo>'
FIELD = (
    '<w:r><w:fldChar w:fldCharType="begin"/></w:r><w:r><w:instrText>PAGEREF x</w:instrText></w:r>'
    f'<w:r><w:fldChar w:fldCharType="separate"/></w:r>{run("7")}<w:r><w:fldChar w:fldCharType="end"/></w:r>'
)
BOX = f"<w:txbxContent>{paragraph(run('boxed'))}</w:txbxContent>"
SHAPE = (
    '<w:r><mc:AlternateContent><mc:Choice Requires="wps"><w:drawing><wps:wsp><wps:txbx>'
    f"{BOX}</wps:txbx></wps:wsp></w:drawing></mc:Choice><mc:Fallback><w:pict>{BOX}</w:pict></mc:Fallback>"
    "</mc:AlternateContent></w:r>"
)


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        (run("a ") + INSERTED + DELETED + run(" b"), "a new b"),
        (run("a ") + MOVED, "a here"),
        (run("a ") + control(run("held") + INSERTED) + run(" b"), "a heldnew b"),
        (f'{run("a ")}<w:hyperlink r:id="x">{run("link")}{INSERTED}{DELETED}</w:hyperlink>', "a linknew"),
        (f"<w:smartTag>{run('smart')}</w:smartTag><w:fldSimple>{run(' field')}</w:fldSimple>", "smart field"),
        (run("page ") + FIELD, "page 7"),
        ("<w:r><w:t>a</w:t><w:tab/><w:t>b</w:t><w:br/><w:t>c</w:t><w:noBreakHyphen/></w:r>", "a\tb\nc-"),
        ("<m:oMath><m:r><m:t>x=1</m:t></m:r></m:oMath>" + run(" holds"), "x=1 holds"),
        (SHAPE + run("around"), "around\n\nboxed"),
    ],
)
def test_whatever_a_paragraph_wraps_its_text_in_is_read(runs, text):
    assert read(paragraph(runs)).text == text
    assert read(table(cells("H"), cell(paragraph(runs)))).text == "H: " + " ".join(text.split())


def test_blocks_in_content_controls_are_read_in_order_and_tables_of_contents_are_not():
    contents = '<w:docPartObj><w:docPartGallery w:val="Table of Contents"/></w:docPartObj>'
    document = read(
        control(paragraph(run("Lamps 1")), contents)
        + control(paragraph(run("Lamps"), style="Heading1") + control(paragraph(run("Lit."))))
        + control(table(cells("City", "Lamp"), cells("Busan", "red")))
        + f'<w:ins w:id="9">{paragraph(run("Kept."))}</w:ins>'
    )
    assert document.text == "Lamps\n\nLit.\n\nCity: Busan; Lamp: red\n\nKept."
    assert [(one.level, one.title) for one in document.headings] == [(1, "Lamps")]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([cells("H1", "H2"), control(cells("held")) + cells("b")], "H1: held; H2: b"),
        ([cells("H1", "H2"), cell(control(paragraph(run("a")))) + cells("b")], "H1: a; H2: b"),
        (
            [
                cells("H1", "H2"),
                cell(paragraph(run("a")) + table(cells("x", "y"), cells("1", "2"))) + cells("b"),
            ],
            "H1: a x: 1; y: 2; H2: b",
        ),
        ([cells("H1", "H2"), cell(table(cells("x", "y")) + paragraph()) + cells("b")], "H1: x; y; H2: b"),
        ([cells("H1", "H2"), "<w:trPr><w:del w:id='1'/></w:trPr>" + cells("a"), cells("b")], "H1: b"),
        ([cells("H1", "H2"), "<w:trPr><w:gridBefore w:val='1'/></w:trPr>" + cells("b")], "H2: b"),
        (
            [
                cells("H1", "H2"),
                cell(paragraph(run("m")), '<w:vMerge w:val="restart"/>') + cells("a"),
                cell(paragraph(), "<w:vMerge/>") + cells("b"),
                cell(paragraph(run("wide")), '<w:gridSpan w:val="2"/>'),
            ],
            "H1: m; H2: a\nH1: m; H2: b\nH1: wide",
        ),
        ([cell(paragraph(), "<w:vMerge/>") + cells("b")], "b"),
        ([cell(paragraph(run("a")), '<w:gridSpan w:val="x"/>') + cells("b")], "a | b"),
    ],
)
def test_table_cells_keep_all_they_hold_under_their_columns(rows, text):
    assert read(table(*rows)).text == text


def test_a_table_without_rows_is_passed_over():
    assert read(table() + paragraph(run("after"))).text == "after"
    assert read(table(cells("H1"), cell(table())) + paragraph(run("after"))).text == "H1\n\nafter"
