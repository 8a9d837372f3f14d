"""Processes that are killed, or meet one another, at the worst moments: the store loses and mixes nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.atomic import partial_name
from models.manifest import FILE_NAME
from models.staging import Stage
from models.store import Store, UnknownModel

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of three files, copied in the order of their names."""
    path = tmp_path / "m"
    path.mkdir()
    (path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    save_file({"a": np.zeros((2, 3), np.float32)}, path / "model.safetensors")
    (path / "tokenizer.json").write_text("{}")
    return path


def start(script: str, store: Store) -> subprocess.Popen[str]:
    """A process of its own that runs the script with `store` at hand."""
    head = f"from models.store import Store\nstore = Store({str(store.root)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + textwrap.dedent(script)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def killed(script: str, store: Store) -> None:
    """Run a script that kills itself."""
    process = start(script, store)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def pull_until(moment: str, folder: Path) -> str:
    """A pull that kills itself with SIGKILL at its first report of a moment."""
    return f"""
        import os
        def report(what, done, total):
            if what == {moment!r}:
                os.kill(os.getpid(), 9)
        store.pull({str(folder)!r}, progress=report)
    """


def paths(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_pull_killed_within_a_file_keeps_the_files_before_it_and_ends_whole(store, folder):
    killed(pull_until("copying model.safetensors", folder), store)
    assert store.entries() == []
    copied = []
    entry = store.pull(str(folder), progress=lambda what, _done, _total: copied.append(what))
    assert {what for what in copied if what.startswith("copying")} == {
        "copying model.safetensors",
        "copying tokenizer.json",
    }
    assert paths(entry.path) == {"config.json", "model.safetensors", "tokenizer.json", FILE_NAME}
    assert (entry.path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert store.partial() == []


def test_a_pull_killed_while_it_publishes_lists_no_manifest_among_its_files(store, folder):
    script = f"""
        import os
        from models import staging
        staging.sync = lambda path: os.kill(os.getpid(), 9)
        store.pull({str(folder)!r})
    """
    killed(script, store)
    assert (Stage(store.pulls / "m").content / FILE_NAME).exists(), "killed too early to prove anything"
    entry = store.pull(str(folder))
    assert {file.path for file in entry.manifest.files} == {
        "config.json", "model.safetensors", "tokenizer.json",
    }  # fmt: skip
    assert store.pull(str(folder)) == entry, "the entry is taken for changed"


def test_an_entry_killed_between_the_two_renames_of_a_replacement_comes_back(store, folder):
    old = store.add(folder, replace=True)
    (folder / "tokenizer.json").write_text('{"new": 1}')
    script = f"""
        import os
        from pathlib import Path
        rename = Path.rename
        def one_rename(self, target):
            rename(self, target)
            os.kill(os.getpid(), 9)
        Path.rename = one_rename
        store.add(Path({str(folder)!r}), replace=True)
    """
    killed(script, store)
    assert store.entries() == [], "killed too early to prove anything"
    (folder / "tokenizer.json").write_text("{}")
    assert store.add(folder) == old
    (folder / "tokenizer.json").write_text('{"new": 1}')
    new = store.add(folder, replace=True)
    assert (new.path / "tokenizer.json").read_text() == '{"new": 1}'


def test_what_left_the_folder_while_a_pull_was_interrupted_is_not_in_the_entry(store, folder):
    killed(pull_until("hashing config.json", folder), store)
    (folder / "tokenizer.json").unlink()
    assert paths(store.pull(str(folder)).path) == {"config.json", "model.safetensors", FILE_NAME}


def test_half_written_files_of_a_killed_process_are_not_in_the_entry(store, folder):
    stage = Stage(store.pulls / "m")
    stage.prepare(f"file:{folder}")
    left = stage.content / partial_name("x.json").replace(str(os.getpid()), "1")
    left.write_text("half")
    assert left.name not in paths(store.pull(str(folder)).path)


PULL_WITHIN = """
    import sys
    def report(what, done, total):
        if what == "hashing config.json":
            print("pulling", flush=True)
            sys.stdin.readline()
    print(store.pull({folder!r}, progress=report).name, flush=True)
"""


def stopped_within_a_pull(store: Store, folder: Path) -> subprocess.Popen[str]:
    """A process that has begun to pull and goes on once it is written a line."""
    process = start(PULL_WITHIN.format(folder=str(folder)), store)
    assert process.stdout is not None
    assert process.stdout.readline() == "pulling\n"
    return process


def test_removal_during_a_pull_waits_for_it_says_so_and_then_removes(store, folder):
    process = stopped_within_a_pull(store, folder)
    told = []

    def report(what, _done, _total):
        told.append(what)
        print("go on", file=process.stdin, flush=True)

    store.remove("m", progress=report)
    assert process.communicate(timeout=60)[0] == "m\n", "the pull did not end as if it were alone"
    assert told == ["waiting for another process that works on m"]
    assert store.entries() == []
    assert store.partial() == []


def test_of_two_removals_at_once_one_finds_nothing_to_remove(store, folder, monkeypatch):
    store.pull(str(folder))
    from models import store as module

    locked = module.locked

    def late(path, **options):
        with locked(path, **options):
            Store(store.root).models.joinpath("m").rename(store.root / "gone")
        return locked(path, **options)

    monkeypatch.setattr(module, "locked", late)
    with pytest.raises(UnknownModel, match="no model named 'm'"):
        store.remove("m")


def test_a_second_pull_of_the_same_name_waits_and_finds_the_entry(store, folder):
    process = stopped_within_a_pull(store, folder)
    told = []

    def report(what, _done, _total):
        told.append(what)
        print("go on", file=process.stdin, flush=True)

    entry = store.pull(str(folder), progress=report)
    assert process.communicate(timeout=60)[0] == "m\n"
    assert told == ["waiting for another process that works on m"], "it was copied twice"
    assert json.loads((entry.path / FILE_NAME).read_text())["name"] == "m"


def test_sizes_are_counted_in_a_folder_that_empties_meanwhile(store, monkeypatch):
    stage = Stage(store.pulls / "m")
    stage.prepare("hf:x/y")
    (stage.content / "a.json").write_text("12345")
    is_file = Path.is_file

    def gone(path):
        found = is_file(path)
        if path.name == "a.json":
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "is_file", gone)
    assert store.partial() == [("m", len("hf:x/y"))]
