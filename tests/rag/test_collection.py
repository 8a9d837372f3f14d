"""Searching, checking and repairing a collection; what a killed run leaves."""

import contextlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from rag.broken import BrokenCollection
from rag.collection import Collection, InvalidName, UnknownCollection, directory_of
from rag.errors import RagError
from rag.ingest import index

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, folder, embedder):
    path = tmp_path / "collections" / "notes"
    index(path, [folder], embedder=embedder, chunk_tokens=100, overlap=10)
    return path


@pytest.fixture
def collection(home):
    opened = Collection.open(home)
    yield opened
    opened.close()


def test_passages_name_their_place_and_quote_the_parsed_text(collection, folder, embedder):
    passage = collection.search("train rule 4", k=1, embedder=embedder)[0]
    text = (folder / "inner/travel.md").read_text("utf-8")
    assert passage.file == "inner/travel.md"
    assert passage.path == str(folder / "inner/travel.md")
    assert text[passage.start : passage.end] == passage.text
    assert passage.start <= passage.best[0] < passage.best[1] <= passage.end
    assert passage.snippet in passage.text
    assert 0 < passage.score <= 1
    assert passage.page is None


def test_k_passages_come_best_first(collection, embedder):
    for k in (1, 4, 1000):
        scores = [passage.score for passage in collection.search("salary", k=k, embedder=embedder)]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == min(k, collection.info().n_chunks)
    with pytest.raises(RagError, match="k is 0"):
        collection.search("salary", k=0, embedder=embedder)


@pytest.mark.parametrize(
    "question",
    [
        '"',
        "a AND (b",
        "NEAR(x y, 3) OR -z*",
        "heading:salary",
        "^body",
        "'; DROP TABLE files; --",
        "?!",
        "☃",
        " ",
        "word " * 20_000,
        "\x00null",
        "OR",
    ],
)
def test_operators_of_full_text_search_in_a_question_are_data(collection, embedder, question):
    collection.search(question, k=2, embedder=embedder)


def test_unknown_collections_are_named_with_those_that_exist(home):
    with pytest.raises(UnknownCollection, match="notes"):
        Collection.open(home.with_name("nosuch"))


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "", ".hidden", "a" * 65, "a b", "-x"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(InvalidName):
        directory_of(tmp_path, name)


def test_an_open_collection_sees_what_a_later_run_commits(collection, home, folder, embedder):
    assert collection.search("submarine", k=1, embedder=embedder)
    (folder / "new.txt").write_text("The submarine is yellow.", "utf-8")
    (folder / "pay.md").unlink()
    index(home, [folder], embedder=embedder)
    assert collection.search("submarine yellow", k=1, embedder=embedder)[0].file == "new.txt"
    files = {passage.file for passage in collection.search("salary", k=50, embedder=embedder)}
    assert "pay.md" not in files


def test_copies_of_one_text_leave_room_for_others(home, folder, embedder):
    for number in range(300):
        (folder / f"copy{number}.txt").write_text("The submarine is yellow, submarine.", "utf-8")
    (folder / "one.txt").write_text("A submarine dives.", "utf-8")
    (folder / "two.txt").write_text("Nobody saw the submarine.", "utf-8")
    index(home, [folder], embedder=embedder)
    collection = Collection.open(home)
    found = collection.search("yellow submarine", k=5, embedder=embedder)
    assert {"one.txt", "two.txt"} < {passage.file for passage in found}
    assert len({passage.text for passage in found}) == 5
    assert len(collection.search("yellow submarine", k=40_000, embedder=embedder)) > 5
    collection.close()


def test_a_decomposed_question_finds_composed_text(home, folder, embedder):
    (folder / "leave.txt").write_text("육아휴직은 열두 달입니다.", "utf-8")
    index(home, [folder], embedder=embedder)
    collection = Collection.open(home)
    question = "육아휴직은 열두 달입니까"
    composed = collection.search(question, k=3, embedder=embedder)
    assert composed[0].file == "leave.txt"
    assert collection.search(unicodedata.normalize("NFD", question), k=3, embedder=embedder) == composed
    collection.close()


def test_an_open_collection_that_is_deleted_is_gone_and_one_indexed_again_is_read(home, folder, embedder):
    collection = Collection.open(home)
    collection.search("salary", k=1, embedder=embedder)
    shutil.rmtree(home)
    with pytest.raises(UnknownCollection):
        collection.search("salary", k=1, embedder=embedder)
    (folder / "pay.md").unlink()
    index(home, [folder], embedder=embedder)
    collection.search("salary", k=1, embedder=embedder)
    shutil.rmtree(home)
    (folder / "boats.txt").write_text("Boats float on water.", "utf-8")
    index(home, [folder], embedder=embedder)
    assert collection.search("boats water", k=1, embedder=embedder)[0].file == "boats.txt"
    assert collection.info().n_files == 3
    collection.close()


#: What a manifest may hold that is none.
MANIFESTS = ["{", "[1]", '"text"', "1", "null", "{}", '{"file": null}', "\udcff", "[" * 50_000]


@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "no manifest", *MANIFESTS, "stale"])
def test_a_lost_or_damaged_generation_changes_no_answer_and_is_written_again(home, folder, embedder, damage):
    expected = Collection.open(home).search("salary rule 2", k=5, embedder=embedder)
    (generation,) = home.glob("vectors-*.faiss")
    data = generation.read_bytes()
    if damage == "missing":
        generation.unlink()
    elif damage == "cut":
        generation.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        generation.write_bytes(data[:-100] + bytes(byte ^ 255 for byte in data[-100:]))
    elif damage == "no manifest":
        (home / "vectors.json").unlink()
    elif damage in MANIFESTS:
        (home / "vectors.json").write_text(damage, "utf-8", errors="surrogateescape")
    else:
        with sqlite3.connect(home / "collection.sqlite") as sql:
            sql.execute("UPDATE meta SET value = value + 1 WHERE key = 'change'")
        sql.close()
    collection = Collection.open(home)
    assert collection.search("salary rule 2", k=5, embedder=embedder) == expected
    (sentence,) = collection.verify()
    assert "vector index" in sentence
    report = index(home, [folder], embedder=embedder)
    assert (report.unchanged, report.embedded_windows) == (3, 0)
    assert collection.verify() == []
    assert collection.search("salary rule 2", k=5, embedder=embedder) == expected
    collection.close()


def test_vectors_of_another_length_are_one_error(home, embedder):
    (home / "vectors.json").unlink()
    with contextlib.closing(sqlite3.connect(home / "collection.sqlite")) as sql, sql:
        sql.execute("UPDATE vectors SET vector = x'00000000'")
    with pytest.raises(BrokenCollection, match="not of 64 numbers"):
        Collection.open(home).search("salary", embedder=embedder)


@pytest.mark.parametrize("left", [b"", None])
def test_a_database_without_tables_is_no_collection_yet(tmp_path, folder, embedder, left):
    """What a full disk or a lost machine may leave of a first run."""
    home = tmp_path / "collections" / "begun"
    home.mkdir(parents=True, exist_ok=True)
    if left is not None:
        (home / "collection.sqlite").write_bytes(left)
    else:
        with contextlib.closing(sqlite3.connect(home / "collection.sqlite")) as sql:
            sql.execute("PRAGMA journal_mode = WAL")
    with pytest.raises(UnknownCollection, match="lq index begun"):
        Collection.open(home)
    assert index(home, [folder], embedder=embedder).added == 3
    assert Collection.open(home).verify() == []


def test_a_database_of_something_else_is_refused(tmp_path):
    home = tmp_path / "collections" / "other"
    home.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(home / "collection.sqlite")) as sql, sql:
        sql.execute("CREATE TABLE theirs (x)")
    with pytest.raises(BrokenCollection, match="schema is version 0"):
        Collection.open(home)


def test_lost_words_and_vectors_are_found_and_a_rebuild_brings_them_back(home, folder, embedder):
    with sqlite3.connect(home / "collection.sqlite") as sql:
        sql.execute("DELETE FROM lexical WHERE rowid = 1")
        sql.execute("DELETE FROM vectors WHERE hash = (SELECT hash FROM windows ORDER BY id DESC LIMIT 1)")
    sql.close()
    collection = Collection.open(home)
    assert len(collection.verify()) >= 2
    assert index(home, [folder], embedder=embedder, rebuild=True).added == 3
    assert collection.info().n_files == 3
    assert collection.verify() == []


WRITER = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from conftest import HashEmbedder
from rag.ingest import index
class Slow(HashEmbedder):
    def documents(self, texts):
        time.sleep(0.01)
        return super().documents(texts)
print("ready", flush=True)
index(Path({home!r}), [Path({folder!r})], embedder=Slow(), chunk_tokens=100, overlap=10,
    progress=lambda what, done, total: print(what, flush=True))
"""


def test_a_run_killed_anywhere_leaves_a_collection_that_the_next_run_completes(tmp_path, folder, embedder):
    home = tmp_path / "collections" / "killed"
    for number in range(60):
        text = "\n\n".join(f"Paragraph {number} {row} about boats and {row * number}." for row in range(60))
        (folder / f"more{number}.txt").write_text(text, "utf-8")
    paths = [str(Path(__file__).parent), str(ROOT)]
    script = WRITER.format(paths=paths, home=str(home), folder=str(folder))
    chance = random.Random(5)
    seen = set()
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        assert writer.stdout
        for _line in range(chance.randrange(2, 60)):
            writer.stdout.readline()
        time.sleep(chance.random() * 0.02)
        os.kill(writer.pid, signal.SIGKILL)
        writer.communicate()
        if (home / "collection.sqlite").exists():
            seen.add(check_consistent(home, embedder))
    report = index(home, [folder], embedder=embedder)
    assert report.unchanged == max(seen) > 0
    assert report.added + report.unchanged == 63
    collection = Collection.open(home)
    assert collection.verify() == []
    assert collection.info().n_files == 63
    collection.close()


def check_consistent(home: Path, embedder) -> int:
    """Files that are whole in a collection that a killed run left."""
    try:
        collection = Collection.open(home)
    except UnknownCollection:
        return 0
    assert all("vector index" in sentence for sentence in collection.verify())
    collection.search("boats", k=3, embedder=embedder)
    n_files = collection.info().n_files
    collection.close()
    return n_files
