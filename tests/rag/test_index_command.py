"""`lq index` and `lq search` on the command line."""

import json

import pytest
from fpdf import FPDF
from typer.testing import CliRunner

from lq.main import build
from models.errors import ModelsError
from rag.errors import RagError


@pytest.fixture
def lq(tmp_path, asset_home, monkeypatch):
    """A function: arguments -> (exit code or error, stdout), in a store with the pulled models."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "models").symlink_to(asset_home / "models")
    monkeypatch.setenv("LQ_HOME", str(home))
    return lambda *arguments: CliRunner().invoke(build(), [str(argument) for argument in arguments])


def test_indexing_and_searching_speak_json(lq, folder):
    built = lq("index", "notes", folder, "--chunk-tokens", 300, "--overlap", 30, "--json")
    assert built.exit_code == 0, built.exception
    report = json.loads(built.stdout)
    assert (report["collection"], report["added"], report["skipped"]) == ("notes", 3, [])
    assert report["notes"] == []
    (folder / "note.xyz").write_text("?")
    again = lq("index", "notes", folder)
    assert "3 unchanged" in again.stdout
    assert "0 windows embedded" in again.stdout
    assert "note.xyz: files of type '.xyz' are not supported" in again.stdout
    found = json.loads(lq("search", "notes", "salary rule", "-k", 2, "--json").stdout)
    assert [passage["rank"] for passage in found["passages"]] == [1, 2]
    assert found["passages"][0]["file"] == "pay.md"
    shown = lq("search", "notes", "salary rule", "-k", 1).stdout
    assert shown.startswith("1. pay.md · About salary")
    assert "(score 0." in shown


def test_pages_without_text_are_told(lq, folder):
    pdf = FPDF()
    pdf.set_font("Helvetica", size=11)
    for text in ("The lamp is lit.", ""):
        pdf.add_page()
        pdf.multi_cell(0, 6, text)
    pdf.output(str(folder / "half.pdf"))
    note = "1 of 2 pages have no text: run OCR"
    assert f"note {folder / 'half.pdf'}: {note}\n" in lq("index", "notes", folder).stdout
    report = json.loads(lq("index", "notes", folder, "--json").stdout)
    assert report["notes"] == [{"path": str(folder / "half.pdf"), "note": note}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "../up", "."), "no name of a collection"),
        (("index", "notes", "/nonexistent/x"), "/nonexistent/x"),
        (("index", "notes", ".", "--chunk-tokens", "3"), "--chunk-tokens 3"),
        (("index", "notes", ".", "--embedder", "nosuch"), "nosuch"),
        (("search", "nosuch", "question"), "no collection 'nosuch'"),
    ],
)
def test_mistakes_are_one_error_each(lq, arguments, message):
    result = lq(*arguments)
    assert isinstance(result.exception, (RagError, ModelsError))
    assert message in str(result.exception)
