"""Bytes of saved states: kept, written whole, checked, found again by the same engine only."""

from pathlib import Path

import numpy as np
import pytest

from engine.stash import State
from engine.states import SUFFIX, States

DATA = np.arange(1000, dtype=np.uint8)


def state(*tokens: int, namespace: str = "") -> State:
    return State(list(tokens), namespace, len(DATA))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prefixes"


def demoted(folder, *tokens: int, fingerprint: str = "f", **options) -> State:
    states, one = States(folder, fingerprint=fingerprint), state(*tokens, **options)
    states.keep(one, DATA)
    states.demote(one)
    return one


def test_what_was_moved_to_disk_is_found_by_the_next_process(folder):
    demoted(folder, 1, 2, 3, namespace="salt")
    later = States(folder, fingerprint="f")
    (found,) = later.found()
    assert (found.tokens, found.namespace, found.size_bytes, found.tier) == ([1, 2, 3], "salt", 1000, "disk")
    assert np.array_equal(later.read(found), DATA)
    later.discard(found)
    assert list(folder.iterdir()) == []
    assert later.read(found) is None


def test_two_states_of_the_same_tokens_share_a_file_until_both_are_gone(folder):
    states, one, two = States(folder, fingerprint="f"), state(1, 2), state(1, 2)
    for each in (one, two):
        states.keep(each, DATA)
        states.demote(each)
    states.discard(one)
    assert np.array_equal(states.read(two), DATA)
    states.discard(two)
    assert list(folder.iterdir()) == []


def test_what_another_fingerprint_left_is_deleted_for_it_fits_nobody_any_more(folder):
    demoted(folder, 1, 2, 3)
    assert list(States(folder, fingerprint="other").found()) == []
    assert list(folder.iterdir()) == []


def test_a_copy_on_disk_outlives_the_process_and_memory_is_still_read(folder):
    states, one = States(folder, fingerprint="f"), state(1, 2, 3)
    states.keep(one, DATA)
    states.copy(one)
    (path,) = folder.iterdir()
    (found,) = (later := States(folder, fingerprint="f")).found()
    assert np.array_equal(later.read(found), DATA)
    path.write_bytes(b"damaged")
    assert np.array_equal(states.read(one), DATA), "from memory"
    path.unlink()
    states.demote(one)
    assert list(folder.iterdir()) == [], "it was written before, and is not again"
    assert states.read(one) is None


def test_files_are_for_their_owner_alone(folder):
    demoted(folder, 1, 2, 3)
    (path,) = folder.iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("damage", ["flipped", "short", "head", "foreign", "gone"])
def test_a_damaged_file_is_no_state(folder, damage):
    demoted(folder, 1, 2, 3)
    states = States(folder, fingerprint="f")
    (found,) = states.found()
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    match damage:
        case "flipped":
            content[-1] ^= 1
        case "short":
            del content[-1]
        case "head":
            content[9] ^= 255
        case "foreign":
            content[:8] = b"nonsense"
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content)
    assert states.read(found) is None


def test_a_file_that_was_cut_short_is_deleted_and_not_counted(folder):
    demoted(folder, 1, 2, 3)
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert list(States(folder, fingerprint="f").found()) == []
    assert not path.exists()


def test_rubbish_in_the_folder_is_cleared_and_others_files_stay(folder):
    folder.mkdir()
    (folder / "half.part").write_bytes(b"x")
    (folder / f"broken{SUFFIX}").write_bytes(b"x" * 50)
    (folder / "notes.txt").write_text("mine")
    assert list(States(folder, fingerprint="f").found()) == []
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_a_disk_that_cannot_be_written_costs_the_state_and_nothing_else(folder, monkeypatch):
    states, one = States(folder, fingerprint="f"), state(1, 2)
    states.keep(one, DATA)
    monkeypatch.setattr("engine.states.os.open", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert not states.demote(one)
    assert states.read(one) is None
    monkeypatch.undo()
    states.keep(one, DATA)
    assert states.demote(one)


def test_half_a_write_leaves_no_file(folder, monkeypatch):
    states, one = States(folder, fingerprint="f"), state(1, 2)
    states.keep(one, DATA)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    assert not states.demote(one)
    assert list(folder.iterdir()) == []


def test_without_a_folder_memory_is_all():
    states, one = States(), state(1, 2)
    states.keep(one, DATA)
    assert np.array_equal(states.read(one), DATA)
    states.demote(one)
    assert states.read(one) is None
    assert list(states.found()) == []
