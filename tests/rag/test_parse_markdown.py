"""Markdown keeps its source: references, tables and lists lose nothing, front matter is told from rules."""

from pathlib import Path

import pytest

from rag.document import Document, Unreadable
from rag.parse import parse


def read(source: str) -> Document:
    return parse(Path("a.md"), source.encode())


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("See [the lamp][l].\n\n[l]: http://x.y 'Lit'\n", "See [the lamp][l].\n\n[l]: http://x.y 'Lit'"),
        ("[a]: <x>\n[b]: y\ntext", "[a]: <x>\n[b]: y\n\ntext"),
        ("[a]: x\n  'a title\n  of two lines'\n\n# End", "[a]: x\n  'a title\n  of two lines'\n\n# End"),
        ("- one\n\n  [m]: /z\n- two\n[n]: /w\n", "- one\n\n  [m]: /z\n- two\n[n]: /w"),
        ("- one\n\n[m]: /z\n- two\n", "- one\n\n[m]: /z\n\n- two"),
        ("[a]: x\n", "[a]: x"),
    ],
)
def test_definitions_of_references_stay(source, text):
    assert read(source).text == text


def test_a_heading_is_named_by_what_its_links_show():
    document = read(
        "# The [lamp][L] of [Busan](x.md), [no link][none], a__b__c and __init__ [oil][]\n\n[l]: /a\n[oil]: b"
    )
    assert document.title == "The lamp of Busan, [no link][none], a__b__c and init oil"
    assert document.text.startswith("# The [lamp][L] of [Busan](x.md)")


@pytest.mark.parametrize(
    ("table", "text"),
    [
        ("| A | B |\n|---|---|\n", "A; B"),
        ("| **A** | [B](x) |\n|---|---|\n| `__init__` | [b](http://y) |", "A: `__init__`; B: [b](http://y)"),
        ("A | B\n:-|-:\n1 | 2 | 3 \n| | 4", "A: 1; B: 2; 3\nB: 4"),
        ("|A|\n|-|\n|a \\| b|\n|c\\||", "A: a | b\nA: c|"),
        ("   | A |\n   |---|\n   | 1 |\n\nafter", "A: 1\n\nafter"),
    ],
)
def test_table_rows_keep_every_cell_as_written(table, text):
    assert read(table).text == text


@pytest.mark.parametrize(
    ("front", "title"),
    [
        ("---\ntitle: Night\n---\n", "Night"),
        (
            "---\n# comment\n'title': x\ntitle: \"Night watch\"\ntags:\n- a\n - b\nlist: [\n  a\n]\n...\n",
            "Night watch",
        ),
        ("---\ndescription: >\n  title: none\n  of this\n\nkey:\n---\n", "a"),
        ("---\ntitle: >\n  Folded\n---\n", "a"),
        ('+++\ntitle = "Night"\n[extra]\nx = 1\n+++\n', "Night"),
    ],
)
def test_front_matter_is_not_text(front, title):
    document = read(f"{front}The lamp: lit.")
    assert (document.title, document.text) == (title, "The lamp: lit.")
    with pytest.raises(Unreadable, match="holds no text"):
        read(front)


@pytest.mark.parametrize(
    "source",
    [
        "---\n\nBetween two rules.\n\n---\n\nAfter.",
        "---\nnote: this is text\nthat goes on\n---\nAfter.",
        "---\n- a list\n---\nAfter.",
        "---\ntitle: it never ends\n\nAfter.",
        "+++\ntitle: other marks\n---\nAfter.",
    ],
)
def test_text_between_rules_is_text(source):
    assert read(source).text.split() == source.split()


def test_offsets_point_into_the_text():
    source = "---\ntitle: T\n---\n[r]: /u\n\n# One\n\n| A |\n|---|\n\n- x\n- y\n\nTwo [r]\n---\n\nEnd"
    document = read(source)
    lines = [document.text[one.start :].split("\n")[0] for one in document.headings]
    assert lines == ["# One", "Two [r]"]
    assert [one.title for one in document.headings] == ["One", "Two [r]"]
    starts = [document.text[start:].split("\n")[0] for start in document.breaks]
    assert starts == ["[r]: /u", "# One", "A", "- x", "- y", "Two [r]", "End"]


@pytest.mark.parametrize("unit", ["[", "[a](", "__a ", "**", "![x][", "|", "`"])
@pytest.mark.parametrize("start", ["# ", "| A |\n|---|\n| ", "---\na: "])
def test_endless_headings_and_rows_are_read(start, unit):
    assert read(start + unit * (200_000 // len(unit)) + " end").text.endswith("end")
