"""The example handbook is parsed whole: every answer to its questions stands in the file that is named."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from rag.chunk import chunk
from rag.parse import parse

EXAMPLES = Path(__file__).parents[2] / "examples"
HANDBOOK = EXAMPLES / "handbook"
QUESTIONS = json.loads((EXAMPLES / "questions.json").read_text("utf-8"))


def text_of(file: str) -> str:
    return " ".join(parse(HANDBOOK / file, (HANDBOOK / file).read_bytes()).text.split())


@pytest.mark.parametrize("entry", QUESTIONS, ids=lambda entry: entry["answer"])
def test_the_answer_stands_in_the_named_file(entry: dict) -> None:
    assert entry["answer"] in text_of(entry["file"])


def test_one_question_is_for_the_demonstration_and_its_answer_stands_in_one_file_only() -> None:
    (entry,) = [entry for entry in QUESTIONS if entry.get("demo")]
    files = [path.name for path in HANDBOOK.iterdir() if entry["answer"] in text_of(path.name)]
    assert files == [entry["file"]]


def test_every_document_has_questions() -> None:
    assert {entry["file"] for entry in QUESTIONS} == {path.name for path in HANDBOOK.iterdir()}


def test_the_manual_keeps_its_pages_and_headings() -> None:
    path = HANDBOOK / "expedition-manual.pdf"
    document = parse(path, path.read_bytes())
    assert [number for _, number in document.pages] == [1, 2, 3]
    assert document.page_at(document.text.index("Saint Elmo")) == 3
    assert "Calibration" in [heading.title for heading in document.headings]
    for heading in document.headings:
        assert document.text[heading.start :].startswith(heading.title)
    chunks = chunk(
        document,
        lambda text: [(i, i + 4) for i in range(0, len(text) - 4, 4)],
        chunk_tokens=300,
        overlap=0,
        window_tokens=100,
    )
    assert chunks[0].heading.startswith("Expedition manual")


def test_the_binary_documents_are_the_same_bytes_when_written_again(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_handbook", EXAMPLES / "make_handbook.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_handbook"] = module
    spec.loader.exec_module(module)
    module.write(tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(written) == {"expedition-manual.pdf", "repair-quality.docx", "선상-안전.docx"}
    for name, data in written.items():
        assert data == (HANDBOOK / name).read_bytes(), name
