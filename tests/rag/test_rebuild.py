"""What holds while a collection is built anew, on a full disk, and over older schemas."""

import contextlib
import sqlite3
from pathlib import Path

import pytest

from rag.broken import FullDisk
from rag.collection import Collection
from rag.discover import MissingPath
from rag.ingest import NothingToIndex, index
from rag.store import Database
from rag.vectors import UnwrittenIndex


@pytest.fixture
def home(tmp_path):
    return tmp_path / "collections" / "notes"


@pytest.fixture
def built(home, folder, embedder):
    return index(home, [folder], embedder=embedder, chunk_tokens=100, overlap=10)


def answers(home, embedder):
    collection = Collection.open(home)
    try:
        return collection.info(), collection.search("salary rule 2", k=4, embedder=embedder)
    finally:
        collection.close()


@pytest.mark.usefixtures("built")
def test_a_rebuild_that_finds_nothing_leaves_the_collection(home, folder, embedder, make_embedder):
    before = answers(home, embedder)
    (folder.parent / "empty").mkdir()
    junk = folder.parent / "junk.pdf"
    junk.write_bytes(b"%PDF-1.7 nothing of the kind")
    for path in (folder.parent / "empty", junk):
        with pytest.raises(NothingToIndex):
            index(home, [path], embedder=make_embedder("other", "fedcba9876543210"), rebuild=True)
    with pytest.raises(MissingPath):
        index(home, [folder.parent / "absent"], embedder=embedder, rebuild=True)
    assert answers(home, embedder) == before
    assert not list(home.glob("rebuild*"))


@pytest.mark.usefixtures("built")
def test_an_interrupted_rebuild_leaves_the_collection_and_keeps_what_it_embedded(
    home, folder, embedder, make_embedder
):
    for number in range(40):
        text = "\n\n".join(f"Paragraph {number} {row} about boats." for row in range(40))
        (folder / f"more{number}.txt").write_text(text, "utf-8")
    before = answers(home, embedder)
    other = make_embedder("other", "fedcba9876543210")

    def stop_halfway(_what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(home, [folder], embedder=other, rebuild=True, progress=stop_halfway)
    assert answers(home, embedder) == before
    half = len(other.texts)
    report = index(home, [folder], embedder=other, rebuild=True)
    assert report.added == 43
    assert 0 < half < len(other.texts) == len(set(other.texts))
    assert not list(home.glob("rebuild*"))
    assert not Collection.open(home).verify()


@pytest.mark.usefixtures("built")
def test_an_open_collection_follows_a_rebuild(home, folder, embedder):
    reader = Collection.open(home)
    assert reader.search("salary rule 2", k=1, embedder=embedder)[0].file == "pay.md"
    (folder / "pay.md").unlink()
    (folder / "boats.txt").write_text("Boats float on water.", "utf-8")
    embedder.texts.clear()
    index(home, [folder], embedder=embedder, chunk_tokens=100, overlap=10, rebuild=True)
    assert len(embedder.texts) == 1
    assert reader.search("boats water", k=1, embedder=embedder)[0].file == "boats.txt"
    assert "pay.md" not in {one.file for one in reader.search("salary", k=50, embedder=embedder)}
    reader.close()


@pytest.mark.usefixtures("built")
def test_a_scratch_database_that_is_none_is_replaced(home, folder, embedder):
    (home / "rebuild.sqlite").write_bytes(b"no database" * 1000)
    assert index(home, [folder], embedder=embedder, rebuild=True).added == 3
    assert not Collection.open(home).verify()


FULL = r"'notes': database or disk is full \(.*sqlite, [\d,]+ bytes free\); free space and run"


@pytest.mark.parametrize("pages", [1, 5, 25])
def test_a_disk_that_is_full_from_the_beginning_leaves_nothing_half_done(
    home, folder, embedder, monkeypatch, pages
):
    real = sqlite3.connect

    def small(*arguments, **options):
        connection = real(*arguments, **options)
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(sqlite3, "connect", small)
    with pytest.raises(FullDisk, match=FULL):
        index(home, [folder], embedder=embedder)
    monkeypatch.undo()
    if pages < 25:
        assert not home.exists()
    else:
        assert Collection.open(home).info().n_files < 3
    report = index(home, [folder], embedder=embedder)
    assert report.added + report.unchanged == 3
    assert not Collection.open(home).verify()


@pytest.mark.usefixtures("built")
def test_a_full_disk_says_so_and_loses_nothing(home, folder, embedder):
    for number in range(30):
        text = " ".join(f"boat{number}x{row}" for row in range(3000))
        (folder / f"more{number}.txt").write_text(text, "utf-8")
    before = answers(home, embedder)
    real = Database.__init__

    def small(self, *arguments, **options):
        real(self, *arguments, **options)
        pages = self.connection.execute("PRAGMA page_count").fetchone()[0]
        self.connection.execute(f"PRAGMA max_page_count = {pages + 20}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Database, "__init__", small)
        with pytest.raises(FullDisk, match=FULL):
            index(home, [folder], embedder=embedder)
        assert all("vector index" in sentence for sentence in Collection.open(home).verify())
        with pytest.raises(FullDisk, match=FULL):
            index(home, [folder], embedder=embedder, rebuild=True)
    assert answers(home, embedder)[1] == before[1]
    index(home, [folder], embedder=embedder)
    assert Collection.open(home).info().n_files == 33


@pytest.mark.usefixtures("built")
def test_a_vector_index_that_cannot_be_written_is_one_error(home, folder, embedder, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    (folder / "boats.txt").write_text("Boats float on water.", "utf-8")
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UnwrittenIndex, match="No space left on device; free space and index again"):
        index(home, [folder], embedder=embedder)
    monkeypatch.undo()
    assert not list(home.glob("*.partial"))
    assert index(home, [folder], embedder=embedder).unchanged == 4
    assert not Collection.open(home).verify()


@pytest.mark.usefixtures("built")
def test_a_collection_of_the_first_schema_is_brought_up(home, folder, embedder):
    with contextlib.closing(sqlite3.connect(home / "collection.sqlite")) as sql, sql:
        sql.execute("ALTER TABLE files DROP COLUMN note")
        sql.execute("PRAGMA user_version = 1")
    assert index(home, [folder], embedder=embedder).unchanged == 3
