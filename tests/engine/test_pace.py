"""How many prompt tokens and guesses a call may hold, from how long others took."""

import pytest

from engine.pace import BRIEF, CAUTION, MIN_PROMPT, Luck, Pace


def paced(*, stall: float | None = 0.25, **seconds: float) -> Pace:
    """Calls of n tokens took so long: n4=0.1 four writing ones; p32=0.3 32 of a prompt."""
    pace = Pace(max_stall_s=stall)
    for name, value in seconds.items():
        count = int(name[1:])
        pace.learn(
            n_writing=count if name[0] == "n" else 0, n_prompt=count if name[0] == "p" else 0, seconds=value
        )
    return pace


def test_a_call_with_a_prompt_takes_no_longer_than_the_stall():
    pace = paced(n1=0.01, n8=0.03, p50=0.25)
    assert pace.n_prompt(8) == int(CAUTION * 0.22 / 0.005)
    assert pace.n_prompt(0) is None, "nobody waits"
    assert paced(stall=None, n1=0.01, p50=0.25).n_prompt(4) is None


def test_a_prompt_gets_its_share_however_slow_the_model():
    assert paced(n1=0.4, p32=9.0).n_prompt(1) == MIN_PROMPT
    assert Pace(max_stall_s=0.25).n_prompt(3) == MIN_PROMPT, "nothing is known yet"


def test_slower_calls_are_believed_sooner_than_faster_ones():
    pace = paced(n1=0.01, p50=0.25)
    before = pace.n_prompt(1)
    pace.learn(n_writing=1, n_prompt=50, seconds=0.51)
    slower = pace.n_prompt(1)
    assert before is not None
    assert slower is not None
    assert slower < 0.7 * before
    pace.learn(n_writing=1, n_prompt=50, seconds=0.26)
    faster = pace.n_prompt(1)
    assert faster is not None
    assert slower < faster < before


def test_after_a_surprise_calls_are_planned_with_more_room_for_a_while():
    calm, startled = paced(n1=0.01, p50=0.25), paced(n1=0.01, p50=0.25)
    startled.learn(n_writing=1, n_prompt=50, seconds=0.35)  # a token takes 6.8 ms instead of 4.8
    calm.learn(n_writing=1, n_prompt=50, seconds=0.26)
    sizes = []
    for _ in range(60):
        sizes.append(startled.n_prompt(1))
        startled.learn(n_writing=1, n_prompt=50, seconds=0.26)
    assert sizes == sorted(sizes), "less and less of it is left"
    assert sizes[0] * 0.007 < 0.25 * CAUTION, "another such call would still be within the stall"
    assert sizes[-1] == pytest.approx(calm.n_prompt(1), abs=1)


def test_a_brief_call_is_a_part_of_the_stall_and_never_nothing():
    pace = paced(n8=0.03, p50=0.125)
    assert pace.n_brief() == int(CAUTION * BRIEF * 0.25 / 0.0025)
    assert paced(p32=9.0).n_brief() == MIN_PROMPT, "however slow the model"
    assert Pace(max_stall_s=0.25).n_brief() == MIN_PROMPT, "nothing is known yet"
    assert paced(stall=None, p50=0.25).n_brief() is None


def test_what_guesses_take_is_not_what_as_many_sequences_take():
    pace = paced(n8=0.030, n16=0.040)
    assert pace.guessing_s(8, 8) == pytest.approx(0.040), "a hope, before any were made"
    pace.learn(n_writing=8, n_prompt=0, n_guesses=8, seconds=0.090)
    assert pace.guessing_s(8, 8) == pytest.approx(0.090)
    assert pace.guessing_s(8, 4) == pytest.approx(0.060), "on a line from none"
    assert pace.guessing_s(8, 0) == pace.writing_s(8)
    assert pace.writing_s(16) == pytest.approx(0.040)
    assert pace.guessing_s(4, 4) == pace.writing_s(8), "beside four sequences none were made"


def test_guesses_that_took_long_are_given_up_and_tried_again_later():
    pace = paced(n8=0.030, n16=0.031)
    luck = lucky(pace, "a", right=True)
    assert luck.worthwhile({"a": 8}, 8) == {"a": 8}
    pace.learn(n_writing=8, n_prompt=0, n_guesses=8, seconds=0.300)
    tries = 0
    while not luck.worthwhile({"a": 8}, 8):
        tries += 1
        assert tries < 5000
    assert tries > 50


def test_times_between_known_ones_lie_on_a_line():
    pace = paced(n1=0.010, n4=0.025, n8=0.065)
    assert pace.writing_s(0) == 0
    assert pace.writing_s(1) == pytest.approx(0.010)
    assert pace.writing_s(2) == pytest.approx(0.015)
    assert pace.writing_s(6) == pytest.approx(0.045)
    assert pace.writing_s(9) == pytest.approx(0.075)
    assert Pace().writing_s(5) == 0
    assert paced(n4=0.1).writing_s(2) == pytest.approx(0.1), "fewer tokens may take as long"


def lucky(pace: Pace, key: str, *, right: bool, times: int = 20) -> Luck:
    luck = Luck(pace)
    for _ in range(times):
        luck.learn(key, n_guesses=4, n_right=4 if right else 0)
    return luck


CHEAP = {"n1": 0.010, "n8": 0.020}  # eight tokens take twice as long as one
DEAR = {"n1": 0.010, "n8": 0.090}


def test_guesses_that_come_true_are_made_where_they_are_cheap():
    assert lucky(paced(**CHEAP), "a", right=True).worthwhile({"a": 7}, 1) == {"a": 7}
    assert lucky(paced(**DEAR), "a", right=True).worthwhile({"a": 7}, 1) == {}


def test_guesses_that_fail_are_given_up_and_tried_again_later():
    luck = lucky(paced(**CHEAP), "a", right=False)
    assert luck.worthwhile({"a": 7}, 1) == {}
    tries = 0
    while not luck.worthwhile({"a": 7}, 1):
        tries += 1
        assert tries < 5000
    assert tries > 50


def test_a_call_of_many_sequences_leaves_no_room_for_guesses():
    pace = paced(n1=0.010, n8=0.020, n16=0.060, n24=0.100)
    luck = lucky(pace, "a", right=True)
    assert luck.worthwhile({"a": 4}, 1)
    assert not luck.worthwhile({"a": 4}, 16)


def test_the_sequence_with_more_luck_gets_the_guesses():
    luck = lucky(paced(n1=0.010, n2=0.011, n6=0.013, n12=0.040), "good", right=True)
    for _ in range(20):
        luck.learn("bad", n_guesses=4, n_right=0)
    counts = luck.worthwhile({"good": 4, "bad": 4}, 2)
    assert counts.get("good", 0) > counts.get("bad", 0)
    luck.forget("bad")
    assert luck.chance("bad") == luck.chance("never seen")


def test_guesses_that_take_long_to_make_are_fewer():
    luck = lucky(paced(**CHEAP), "a", right=True)
    assert luck.worthwhile({"a": 7}, 1, depth_s=0.0005)
    assert luck.worthwhile({"a": 7}, 1, depth_s=0.02) == {}
