"""`lq index` and `lq search` on the command line."""

import json
import re
import shutil

import pytest
from fpdf import FPDF
from typer.testing import CliRunner

from lq.main import build
from models.errors import ModelsError
from rag.errors import RagError
from rag.settings import CHUNK_RANGE, LostEmbedder


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


def test_a_collection_whose_embedder_is_gone_says_how_to_go_on(lq, folder, tmp_path, minilm_dir):
    own = tmp_path / "own"
    shutil.copytree(minilm_dir, own)
    assert lq("index", "notes", folder, "--embedder", own).exit_code == 0
    shutil.rmtree(own)
    for command in (("search", "notes", "salary"), ("index", "notes", folder)):
        error = lq(*command).exception
        assert isinstance(error, LostEmbedder)
        assert f"'{own}', which cannot be had: {own}" in str(error)
        repair = str(error).rpartition("with another one: ")[2]
        assert repair == f"lq index notes {folder} --embedder all-minilm-l6-v2 --rebuild"
    assert lq(*repair.split()[1:]).exit_code == 0
    assert lq("search", "notes", "salary").exit_code == 0


def test_help_and_refusal_name_the_same_chunk_lengths(lq):
    low, high = CHUNK_RANGE
    assert f"tokens of a chunk, {low} to {high}" in " ".join(
        re.sub("[│|]", " ", lq("index", "--help").stdout).split()
    )
    for wrong in (low - 1, high + 1):
        result = lq("index", "notes", ".", "--chunk-tokens", wrong)
        assert f"--chunk-tokens {wrong} is out of range: give {low} to {high} tokens" in str(result.exception)


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
