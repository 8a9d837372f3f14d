"""Processes side by side: all tasks are done, what fails is said, and none is left behind."""

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from quantize import processes
from quantize.errors import QuantizeError
from quantize.processes import WorkerDied, WorkFailed, side_by_side


class Odd(QuantizeError):
    """An error whose text is not what it is made of."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"{number} is {reason}")


def note(folder: Path, task: int) -> None:
    """Leave this process's id in a file of the task's name; then fail, die or stay, as the number says."""
    writing = folder / f"writing-{task}"
    writing.write_text(str(os.getpid()))
    writing.rename(folder / str(task))  # a process killed while it writes leaves no half of it
    if task == 13:
        wait_for(folder / "99")
        raise Odd(task, "odd")
    if task == 66:
        os.kill(os.getpid(), signal.SIGKILL)
    if task == 99:
        time.sleep(600)


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def kill_the_parent(_task: int) -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(600)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepare(folder: Path) -> None:
    (folder / f"ready-{os.getpid()}").touch()


def done(folder: Path, tasks, **options) -> list[int]:
    work = functools.partial(note, folder)
    return list(side_by_side(work, tasks, n_processes=2, name="noting numbers", **options))


def pids(folder: Path) -> set[int]:
    return {int(path.read_text()) for path in folder.iterdir() if path.name.isdigit()}


def test_every_task_is_done_once_by_processes_that_were_set_up(tmp_path):
    assert sorted(done(tmp_path, range(7), set_up=functools.partial(prepare, tmp_path))) == list(range(7))
    assert len(pids(tmp_path)) == 2
    assert {path.name for path in tmp_path.glob("ready-*")} == {f"ready-{pid}" for pid in pids(tmp_path)}
    assert os.getpid() not in pids(tmp_path)


def test_fewer_tasks_than_processes_start_no_more(tmp_path):
    assert done(tmp_path, [5]) == [5]
    assert len(pids(tmp_path)) == 1


def test_nothing_to_do_is_nothing(tmp_path):
    assert done(tmp_path, []) == []


def test_what_is_wrong_is_said_and_all_processes_are_gone(tmp_path):
    with pytest.raises(WorkFailed, match=r"^13 is odd$"):
        done(tmp_path, [99, 13])
    assert len(pids(tmp_path)) == 2
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path))


def test_process_that_dies_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(WorkerDied, match=r"noting numbers died \(killed, most likely .*; free memory"):
        done(tmp_path, [66])


def test_process_that_dies_before_it_takes_its_task_is_the_same_error(tmp_path):
    with pytest.raises(WorkerDied, match=r"noting numbers died \(killed, most likely"):
        done(tmp_path, [1], set_up=die)


def test_who_stops_listening_stops_the_work(tmp_path):
    going = side_by_side(functools.partial(note, tmp_path), [99, 1, 2], n_processes=2, name="noting")
    assert next(going) == 1
    wait_for(tmp_path / "99")
    going.close()
    assert not any(psutil.pid_exists(pid) for pid in pids(tmp_path))


def test_a_process_whose_parent_was_killed_ends_at_once_without_a_word():
    code = """
from quantize.processes import side_by_side
from tests.quantize.test_processes import kill_the_parent
list(side_by_side(kill_the_parent, [1], n_processes=1, name="killing"))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    assert run.returncode == -signal.SIGKILL
    assert run.stderr == b""


@pytest.mark.parametrize("wait_s", [0, 0.3], ids=["before it is told what was done", "without reading that"])
def test_work_ends_quietly_where_the_other_side_of_the_connection_is_gone(wait_s, monkeypatch):
    monkeypatch.setattr(processes, "end_with_the_parent", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    ours, theirs = multiprocessing.Pipe()
    ours.send("a task")
    closing = threading.Timer(wait_s, ours.close)

    def work(_task: str) -> None:
        closing.start()
        if not wait_s:
            closing.join()

    processes._serve(theirs, work, None)
    closing.join()
