"""The black box, and how a process is ended."""

import asyncio
import os

import pytest

from engine import black_box, process
from engine.black_box import BlackBox
from engine.process import Process


@pytest.fixture
def page():
    descriptor = black_box.make()
    yield descriptor
    os.close(descriptor)


def test_the_last_note_is_read_on_the_other_side(page):
    inside, outside = BlackBox(page), BlackBox(page)
    assert (outside.ids, outside.n_notes) == (frozenset(), 0)
    inside.note([3, 2**40])
    assert outside.ids == {3, 2**40}
    inside.note([5])
    assert (outside.ids, outside.n_notes) == ({5}, 2)
    inside.tick()
    assert (outside.ids, outside.n_notes) == ({5}, 3), "getting on clears nobody of suspicion"
    inside.note(())
    assert outside.ids == frozenset()
    inside.close()
    assert outside.n_notes == 4, "it outlives the process"


def test_more_than_fit_are_cut_and_harm_nothing(page):
    box = BlackBox(page)
    box.note(range(1000))
    assert box.ids == set(range(256))


class FakeChild:
    """A process that notes its progress so many times before it ends, or hangs then; each takes too long."""

    def __init__(self, box: BlackBox, n_notes: int, *, hangs: bool) -> None:
        self.box = box
        self.left = n_notes
        self.hangs = hangs
        self.stderr = self
        self.returncode = None
        self.killed = False

    async def read(self, _size: int) -> bytes:
        return b""

    async def wait(self) -> int:
        if self.left:
            self.left -= 1
            self.box.note(())
            await asyncio.sleep(60)
        elif self.hangs and not self.killed:
            await asyncio.sleep(60)
        return 0

    def kill(self) -> None:
        self.killed = True


@pytest.mark.parametrize("hangs", [False, True])
def test_a_process_that_still_writes_is_waited_for_and_one_that_hangs_is_killed(page, monkeypatch, hangs):
    monkeypatch.setattr(process, "STOP_S", 0.01)

    async def main():
        child = FakeChild(box := BlackBox(page), 5, hangs=hangs)
        await Process(child, box).stop()  # pyright: ignore[reportArgumentType]
        assert (child.left, child.killed) == (0, hangs)

    asyncio.run(main())
