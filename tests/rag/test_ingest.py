"""What an index run reads, embeds, keeps and forgets; and what it refuses."""

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
from filelock import FileLock
from fpdf import FPDF

from rag import parse
from rag.broken import BrokenCollection
from rag.collection import Collection
from rag.discover import MissingPath
from rag.embed import UnusableEmbedder
from rag.ingest import CollectionBusy, NothingToIndex, index
from rag.settings import InvalidChunks, OtherChunks, OtherEmbedder


@pytest.fixture
def home(tmp_path):
    return tmp_path / "collections" / "notes"


@pytest.fixture
def built(home, folder, embedder):
    return index(home, [folder], embedder=embedder, chunk_tokens=100, overlap=10)


def files_found(home, embedder, question):
    collection = Collection.open(home)
    try:
        return {passage.file for passage in collection.search(question, k=3, embedder=embedder)}
    finally:
        collection.close()


def test_a_first_run_adds_every_file_and_embeds_every_window(built, embedder, home):
    assert (built.added, built.changed, built.unchanged, built.removed) == (3, 0, 0, 0)
    assert built.embedded_windows == len(embedder.texts) == len(set(embedder.texts)) > built.chunks
    assert not Collection.open(home).verify()


@pytest.mark.usefixtures("built")
def test_an_unchanged_folder_embeds_nothing(home, folder, embedder):
    embedder.texts.clear()
    again = index(home, [folder], embedder=embedder)
    assert (again.added, again.changed, again.unchanged, again.embedded_windows) == (0, 0, 3, 0)
    assert embedder.texts == []


@pytest.mark.usefixtures("built")
def test_an_edited_file_embeds_only_its_changed_windows(home, folder, embedder):
    total = len(embedder.texts)
    embedder.texts.clear()
    path = folder / "pay.md"
    path.write_text(path.read_text("utf-8").replace("salary3word5", "bonus"), "utf-8")
    report = index(home, [folder], embedder=embedder)
    assert (report.changed, report.unchanged) == (1, 2)
    assert 0 < len(embedder.texts) <= 2 < total
    assert all("bonus" in text for text in embedder.texts)
    assert not Collection.open(home).verify()


@pytest.mark.usefixtures("built")
def test_an_edit_of_the_same_size_and_time_right_after_indexing_is_noticed(home, folder, embedder):
    path = folder / "pay.md"
    facts = path.stat()
    path.write_text(path.read_text("utf-8").replace("salary3word5", "salary3wordX"), "utf-8")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert index(home, [folder], embedder=embedder).changed == 1


@pytest.mark.usefixtures("built")
def test_a_touched_file_is_not_parsed_again(home, folder, embedder):
    os.utime(folder / "pay.md", (1, 1))
    report = index(home, [folder], embedder=embedder)
    assert (report.changed, report.unchanged, report.embedded_windows) == (0, 3, 0)


@pytest.mark.usefixtures("built")
def test_deleted_files_vanish_and_moved_ones_are_not_embedded_again(home, folder, embedder):
    embedder.texts.clear()
    (folder / "leave.md").unlink()
    (folder / "pay.md").rename(folder / "wages.md")
    report = index(home, [folder], embedder=embedder)
    assert (report.added, report.removed, report.unchanged) == (1, 2, 1)
    assert embedder.texts == []
    assert files_found(home, embedder, "holiday salary") <= {"wages.md", "inner/travel.md"}


@pytest.mark.usefixtures("built")
def test_files_of_another_root_stay(home, tmp_path, embedder):
    other = tmp_path / "other"
    other.mkdir()
    (other / "boats.txt").write_text("Boats float on water.", "utf-8")
    report = index(home, [other], embedder=embedder)
    assert (report.added, report.removed) == (1, 0)
    assert Collection.open(home).info().n_files == 4


def test_copies_of_a_file_are_embedded_once_and_shown_once(home, folder, embedder):
    for number in range(5):
        shutil.copy(folder / "pay.md", folder / f"copy{number}.md")
    report = index(home, [folder], embedder=embedder)
    assert report.added == 8
    assert len(embedder.texts) == len(set(embedder.texts))
    passages = Collection.open(home).search("salary", k=5, embedder=embedder)
    assert len({passage.text for passage in passages}) == len(passages)


def test_unreadable_files_are_reported_and_skipped(home, folder, embedder):
    (folder / "broken.pdf").write_bytes(b"%PDF-1.7 nothing of the kind")
    (folder / "empty.txt").write_text("")
    report = index(home, [folder], embedder=embedder)
    reasons = dict(report.skipped)
    assert report.added == 3
    assert set(reasons) == {str(folder / "broken.pdf"), str(folder / "empty.txt")}
    assert all(reasons.values())
    again = index(home, [folder], embedder=embedder)
    assert dict(again.skipped) == reasons


@pytest.mark.usefixtures("built")
def test_a_file_that_became_unreadable_is_no_longer_found(home, folder, embedder):
    (folder / "pay.md").write_bytes(bytes(range(256)) * 20)
    report = index(home, [folder], embedder=embedder)
    assert [path for path, _ in report.skipped] == [str(folder / "pay.md")]
    assert "pay.md" not in files_found(home, embedder, "salary")


def test_nothing_to_index_is_one_error_and_leaves_no_collection(home, tmp_path, embedder):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NothingToIndex, match="empty"):
        index(home, [empty], embedder=embedder)
    (empty / "junk.pdf").write_bytes(b"\x00junk")
    with pytest.raises(NothingToIndex, match=r"junk\.pdf"):
        index(home, [empty], embedder=embedder)
    with pytest.raises(MissingPath, match="absent"):
        index(home, [tmp_path / "absent"], embedder=embedder)
    assert not home.exists()


@pytest.mark.usefixtures("built")
def test_another_embedder_is_refused_with_the_command_that_repairs_it(home, folder, make_embedder):
    other = make_embedder("other", "fedcba9876543210")
    with pytest.raises(OtherEmbedder) as refused:
        index(home, [folder], embedder=other)
    message = str(refused.value)
    assert "'hash' (0123456789abcdef)" in message
    assert f"lq index notes {folder} --embedder other --rebuild" in message
    with pytest.raises(OtherEmbedder, match="--rebuild"):
        Collection.open(home).search("salary", embedder=other)
    assert other.texts == []
    report = index(home, [folder], embedder=other, rebuild=True)
    assert report.added == 3
    assert files_found(home, other, "salary1word1") >= {"pay.md"}
    assert not Collection.open(home).verify()


@pytest.mark.usefixtures("built")
def test_other_chunk_lengths_are_refused_with_the_command_that_repairs_it(home, folder, embedder):
    with pytest.raises(OtherChunks, match="--chunk-tokens 300 --overlap 10 --rebuild"):
        index(home, [folder], embedder=embedder, chunk_tokens=300)
    assert index(home, [folder], embedder=embedder, chunk_tokens=300, rebuild=True).added == 3
    assert Collection.open(home).info().chunk_tokens == 300


def test_chunk_lengths_out_of_range_are_refused(home, folder, embedder):
    with pytest.raises(InvalidChunks, match="--chunk-tokens 5 "):
        index(home, [folder], embedder=embedder, chunk_tokens=5)
    with pytest.raises(InvalidChunks, match="--overlap 200 "):
        index(home, [folder], embedder=embedder, chunk_tokens=300, overlap=200)
    assert not home.exists()


def test_a_second_writer_is_told_so(home, folder, embedder):
    home.parent.mkdir(parents=True)
    with FileLock(home.parent / ".notes.lock"), pytest.raises(CollectionBusy, match="another process"):
        index(home, [folder], embedder=embedder)


@pytest.mark.usefixtures("built")
def test_a_database_that_is_no_database_is_one_error(home, folder, embedder):
    (home / "collection.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(BrokenCollection, match="not a database"):
        index(home, [folder], embedder=embedder)


def test_interrupting_keeps_what_was_embedded(home, folder, embedder):
    for number in range(40):
        text = "\n\n".join(f"Paragraph {number} {index} about boats." for index in range(40))
        (folder / f"more{number}.txt").write_text(text, "utf-8")

    def stop_halfway(_what, done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index(home, [folder], embedder=embedder, progress=stop_halfway)
    half = len(embedder.texts)
    index(home, [folder], embedder=embedder)
    assert 0 < half < len(embedder.texts) == len(set(embedder.texts))
    assert not Collection.open(home).verify()


def test_paths_with_dots_are_written_one_way(home, folder, embedder, monkeypatch):
    inner = folder.parent / "beside"
    inner.mkdir()
    monkeypatch.chdir(inner)
    assert index(home, [Path("../documents")], embedder=embedder).added == 3
    again = index(home, [folder], embedder=embedder)
    assert (again.added, again.removed, again.unchanged) == (0, 0, 3)
    (inner / "boats.txt").write_text("Boats float on water.", "utf-8")
    here = index(home, [Path()], embedder=embedder)
    assert (here.added, here.removed) == (1, 0)
    assert Collection.open(home).info().roots == (str(folder), str(inner))


@pytest.mark.usefixtures("built")
def test_paths_kept_with_dots_by_earlier_versions_are_replaced(home, folder, embedder):
    with contextlib.closing(sqlite3.connect(home / "collection.sqlite")) as sql, sql:
        sql.execute("UPDATE files SET path = replace(path, '/documents/', '/x/../documents/')")
    report = index(home, [folder], embedder=embedder)
    assert (report.added, report.removed, report.embedded_windows) == (3, 3, 0)
    assert Collection.open(home).info().n_files == 3


@pytest.mark.usefixtures("built")
def test_what_was_named_and_deleted_can_be_removed(home, folder, embedder):
    (folder / "pay.md").unlink()
    report = index(home, [folder / "pay.md"], embedder=embedder)
    assert (report.removed, report.added) == (1, 0)
    shutil.rmtree(folder / "inner")
    assert index(home, [folder / "inner"], embedder=embedder).removed == 1
    shutil.rmtree(folder)
    assert index(home, [folder], embedder=embedder).removed == 1
    info = Collection.open(home).info()
    assert (info.n_files, info.roots) == (0, ())
    with pytest.raises(MissingPath):
        index(home, [folder], embedder=embedder)


def test_a_file_that_was_named_and_deleted_leaves_no_trace_when_its_folder_is_indexed(home, folder, embedder):
    index(home, [folder / "pay.md", folder / "leave.md"], embedder=embedder)
    assert "pay.md" in files_found(home, embedder, "salary")
    (folder / "pay.md").unlink()
    report = index(home, [folder], embedder=embedder)
    assert (report.removed, report.added, report.unchanged) == (1, 1, 1)
    assert "pay.md" not in files_found(home, embedder, "salary")
    info = Collection.open(home).info()
    assert (info.n_files, info.roots) == (2, (str(folder / "leave.md"), str(folder)))
    # Every root is there, so that the command which builds the collection again works as it is printed.
    roots = [Path(root) for root in info.roots]
    assert index(home, roots, embedder=embedder, rebuild=True).added == 2


@pytest.mark.usefixtures("built")
def test_a_file_that_cannot_be_opened_for_a_while_is_read_when_it_can(home, folder, embedder, monkeypatch):
    real = Path.read_bytes

    def refuse(path):
        if path.name == "pay.md":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (folder / "pay.md").write_text("Salaries are paid in gold.", "utf-8")
    facts = (folder / "pay.md").stat()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    for _ in range(2):
        report = index(home, [folder], embedder=embedder)
        assert dict(report.skipped) == {str(folder / "pay.md"): "it cannot be read: Permission denied"}
    monkeypatch.undo()
    os.utime(folder / "pay.md", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert index(home, [folder], embedder=embedder).added == 1
    assert "pay.md" in files_found(home, embedder, "gold")


def test_a_file_read_while_it_is_written_is_read_again(home, folder, embedder):
    pdf = FPDF()
    pdf.set_font("Helvetica", size=11)
    pdf.add_page()
    pdf.multi_cell(0, 6, "The lamp is lit.")
    data = bytes(pdf.output())
    path = folder / "lamp.pdf"
    path.write_bytes(data[: len(data) // 3])
    os.utime(path, (1, 1))
    assert [name for name, _ in index(home, [folder], embedder=embedder).skipped] == [str(path)]
    path.write_bytes(data)
    report = index(home, [folder], embedder=embedder)
    assert (report.added, report.unchanged, report.skipped) == (1, 3, ())


@pytest.mark.usefixtures("built")
def test_an_embedder_that_fails_costs_no_file(home, folder, embedder, monkeypatch):
    def broken(_text):
        raise UnusableEmbedder(Path("models/x"), "its weights are damaged")

    (folder / "pay.md").write_text("Salaries are paid in gold.", "utf-8")
    monkeypatch.setattr(embedder, "spans", broken)
    with pytest.raises(UnusableEmbedder, match=r"its weights are damaged; .*lq pull"):
        index(home, [folder], embedder=embedder)
    monkeypatch.undo()
    assert "pay.md" in files_found(home, embedder, "salary")
    assert index(home, [folder], embedder=embedder).changed == 1


@pytest.mark.usefixtures("built")
def test_an_embedder_whose_files_changed_is_told_from_another_one(home, folder, make_embedder):
    changed = make_embedder("hash", "fedcba9876543210")
    message = rf"embedder 'hash' are not those .*put them back, or .*lq index notes {folder} --embedder hash"
    for use in (
        lambda: index(home, [folder], embedder=changed),
        lambda: Collection.open(home).search("salary", embedder=changed),
    ):
        with pytest.raises(OtherEmbedder, match=message):
            use()


@pytest.mark.usefixtures("built")
def test_files_of_a_folder_that_cannot_be_looked_at_stay(home, folder, embedder, monkeypatch):
    real = os.stat

    def refuse(path, *arguments, **options):
        if isinstance(path, str | os.PathLike) and "documents/inner/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    report = index(home, [folder], embedder=embedder)
    assert (report.removed, report.unchanged) == (0, 2)
    assert dict(report.skipped) == {str(folder / "inner/travel.md"): "it cannot be read (Permission denied)"}
    assert Collection.open(home).info().n_files == 3


def test_a_passing_failure_is_tried_again(home, folder, embedder, monkeypatch):
    real = parse.parse

    def fail(path, data):
        if path.name == "pay.md":
            raise MemoryError
        return real(path, data)

    monkeypatch.setattr(parse, "parse", fail)
    report = index(home, [folder], embedder=embedder)
    assert report.added == 2
    assert dict(report.skipped) == {str(folder / "pay.md"): "its parser failed: MemoryError: "}
    monkeypatch.undo()
    assert index(home, [folder], embedder=embedder).added == 1


def test_notes_of_a_file_are_reported_by_every_run(home, folder, embedder):
    pdf = FPDF()
    pdf.set_font("Helvetica", size=11)
    for text in ("The lamp is lit.", "", ""):
        pdf.add_page()
        pdf.multi_cell(0, 6, text)
    pdf.output(str(folder / "half.pdf"))
    expected = ((str(folder / "half.pdf"), "2 of 3 pages have no text: run OCR"),)
    assert index(home, [folder], embedder=embedder).notes == expected
    again = index(home, [folder], embedder=embedder)
    assert (again.unchanged, again.notes) == (4, expected)
