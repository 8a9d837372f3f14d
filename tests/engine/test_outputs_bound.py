"""A call never has more logits than its context was made for, however many write and are guessed for."""

from pathlib import Path

import pytest

from engine.loading import GUESSES_A_CALL, n_outputs
from engine.request import EngineConfig


@pytest.mark.parametrize("n_parallel", [1, 2, 8, 15, 16, 17, 24, 32, 64])
def test_there_is_room_for_all_that_a_call_may_want(n_parallel):
    with_guesses = EngineConfig(Path("model.gguf"), n_parallel=n_parallel)
    wanted = [
        n_writing + (GUESSES_A_CALL if n_writing <= GUESSES_A_CALL else 0)
        for n_writing in range(1, n_parallel + 1)
    ]
    assert n_outputs(with_guesses) == max(wanted)


def test_without_guesses_there_is_one_a_sequence():
    assert n_outputs(EngineConfig(Path("model.gguf"), n_parallel=8, speculation="off")) == 8
