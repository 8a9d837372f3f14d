"""Discovery takes what can be read and says why it leaves the rest."""

import os
from pathlib import Path

import pytest

from rag.discover import LARGEST_BYTES, MissingPath, walk


def names(*paths: Path) -> list[str]:
    return [one.name for one in walk(paths).files]


def reasons(*paths: Path, largest_bytes: int = LARGEST_BYTES) -> dict[str, str]:
    return {Path(one.path).name: one.reason for one in walk(paths, largest_bytes=largest_bytes).skipped}


def write(root: Path, *files: str) -> None:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("lamp", encoding="utf-8")


def test_files_come_sorted_by_folder_with_their_path_below_the_folder(tmp_path: Path) -> None:
    write(tmp_path, "b.md", "a/z.txt", "a/c/d.html", "a.PDF")
    assert names(tmp_path) == ["a.PDF", "b.md", "a/z.txt", "a/c/d.html"]


def test_hidden_files_and_tool_folders_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path, ".git/x.md", ".hidden.md", "node_modules/x.md", "__pycache__/x.py", "~$x.docx", "kept.md")
    assert names(tmp_path) == ["kept.md"]
    assert reasons(tmp_path) == {}


def test_unsupported_empty_and_large_files_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "photo.jpg", "Makefile", "large.txt")
    (tmp_path / "empty.md").touch()
    (tmp_path / "large.txt").write_bytes(b"x" * (3 << 20))
    assert reasons(tmp_path, largest_bytes=2 << 20) == {
        "photo.jpg": "files of type '.jpg' are not supported",
        "Makefile": "files without a suffix are not supported",
        "empty.md": "it is empty",
        "large.txt": "it is 3.0 MiB, larger than 2.0 MiB; split it into parts",
    }


def test_a_file_named_outright_is_taken_by_its_name(tmp_path: Path) -> None:
    write(tmp_path, "a/one.md")
    assert names(tmp_path / "a/one.md") == ["one.md"]


def test_a_file_reached_twice_is_listed_once(tmp_path: Path) -> None:
    write(tmp_path, "a/one.md")
    (tmp_path / "again.md").symlink_to(tmp_path / "a/one.md")
    assert len(names(tmp_path, tmp_path / "a", tmp_path / "a/one.md")) == 1


def test_link_loops_end_and_dangling_links_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "a/one.md")
    (tmp_path / "a/up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "gone.md").symlink_to(tmp_path / "nowhere.md")
    assert names(tmp_path) == ["a/one.md"]
    assert reasons(tmp_path) == {
        "up": "it is a link to a folder that holds it",
        "gone.md": "it is a link to nothing",
    }


def test_a_missing_path_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MissingPath, match="handbok"):
        walk([tmp_path / "handbok"])


def test_a_name_that_is_not_utf8_is_reported_in_printable_letters(tmp_path: Path) -> None:
    write(tmp_path, "kept.md")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff"))
    odd.mkdir()
    write(odd, "inner.md")
    odd.with_suffix(".txt").write_text("lamp")
    assert names(tmp_path, odd) == ["kept.md"]
    reason = "its name is not UTF-8; rename it"
    assert reasons(tmp_path, odd) == {"odd\\xff": reason, "odd\\xff.txt": reason}


def test_a_folder_that_cannot_be_entered_stops_nothing(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "kept.md", "shut/one.md", "shut/inner/two.md")
    real = os.stat

    def refuse(path, *arguments, **options):
        if "shut/" in os.fspath(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert names(tmp_path) == ["kept.md"]
    refused = "it cannot be read (Permission denied)"
    assert reasons(tmp_path) == {"one.md": refused, "inner": refused}
    assert names(tmp_path / "shut/inner") == []
    assert all(one.unseen for one in walk([tmp_path]).skipped)


def test_a_deleted_path_is_passed_over_when_something_was_known_there(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert walk([gone], known=[str(gone / "a.md")]).files == ()
    with pytest.raises(MissingPath):
        walk([gone], known=[str(tmp_path / "gone.md")])


def test_two_spellings_of_a_path_are_one(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path, "docs/one.md")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    (found,) = walk([Path("../docs"), tmp_path / "inner/../docs"]).files
    assert found.path == tmp_path / "docs/one.md"
