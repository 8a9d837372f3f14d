"""How many prompt tokens and guesses a call may hold, from how long others took."""

import pytest

from engine.luck import LOAN, READ_LOAN, Luck
from engine.pace import BRIEF, CAUTION, MIN_PROMPT, Pace


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
    assert pace.guessing_s(4, 8) == pytest.approx(pace.writing_s(4) + 0.060), "the nearest that is known"
    pace.learn(n_writing=8, n_prompt=0, seconds=0.020)
    assert pace.guessing_s(8, 8) == pytest.approx(0.027 + 0.060), "a call is faster, what they add is not"


def test_unlike_numbers_of_guesses_are_a_call_of_their_own_in_streams_only():
    for in_streams, hope in ((True, 0.030 + 0.015), (False, 0.034)):
        pace = Pace(in_streams=in_streams)
        for count, seconds in ((1, 0.010), (4, 0.015), (8, 0.030), (12, 0.034)):
            pace.learn(n_writing=count, n_prompt=0, seconds=seconds)
        assert pace.guessing_s(8, 4, even=False) == pytest.approx(hope)
        assert pace.guessing_s(8, 4) == pytest.approx(0.034)
        pace.learn(n_writing=8, n_prompt=0, n_guesses=4, seconds=0.080, even=False)
        assert pace.guessing_s(8, 4) == pytest.approx(0.034 if in_streams else 0.080)


def test_a_call_is_cut_into_its_own_part_and_each_sequences():
    pace = paced(n1=0.010, n4=0.021, n8=0.024)
    assert pace.shares_s(8) == pytest.approx((0.008, 0.002))
    assert pace.shares_s(1) == pytest.approx((0.010, 0.0))
    assert paced(n1=0.020, n8=0.010).shares_s(8) == pytest.approx((0.010, 0.0)), "a noisy start"
    assert Pace().shares_s(3) == (0.0, 0.0)


def test_what_is_left_of_the_stall_beside_a_call():
    assert paced(stall=0.2).rest_s(0.05) == pytest.approx(CAUTION * 0.2 - 0.05)
    assert paced(stall=None).rest_s(5) == float("inf")


def test_guesses_that_took_long_are_given_up_and_tried_again_later():
    pace = paced(n1=0.030, n9=0.031)
    luck = lucky(pace, "a", right=True)
    assert luck.worthwhile({"a": 8}, 1) == {"a": 8}
    pace.learn(n_writing=1, n_prompt=0, n_guesses=8, seconds=0.300)
    tries = 0
    while not luck.worthwhile({"a": 8}, 1):
        tries += 1
        assert tries < 5000
    assert tries > 20


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


def test_one_that_is_ahead_saves_its_part_of_a_call_and_all_together_a_whole_one():
    pace = paced(n1=0.010, n4=0.013, n8=0.017, n16=0.025)
    alone = lucky(pace, "a", right=True)
    assert alone.worthwhile({"a": 4}, 4) == {}, "the others write no sooner"
    together = lucky(pace, "a", right=True)
    for key in "bcd":
        for _ in range(20):
            together.learn(key, n_guesses=4, n_right=4)
    counts = together.worthwhile(dict.fromkeys("abcd", 4), 4, most=16)
    assert counts == dict.fromkeys("abcd", 4)


def test_with_more_sequences_than_a_call_may_have_guesses_none_are_made():
    luck = lucky(paced(n1=0.010, n32=0.0101), "a", right=True)
    keys = {"a": 8} | dict.fromkeys(range(15), 8)
    assert luck.worthwhile(keys, 16, most=16)
    assert luck.worthwhile(keys | {"more": 8}, 17, most=16) == {}


def test_guesses_of_all_are_no_more_than_a_call_may_have():
    luck = lucky(paced(n1=0.010, n32=0.0101), "a", right=True)
    counts = luck.worthwhile(dict.fromkeys("abc", 8), 3, most=16)
    assert 0 < sum(counts.values()) <= 16


def test_a_debt_is_paid_off_before_guesses_cost_anything_again():
    pace = paced(n1=0.010, n9=0.020)
    luck = lucky(pace, "a", right=True)
    for _ in range(3):
        luck.made(1, n_guesses=8, ahead=[0], seconds=0.020)
    assert luck.debt_s == pytest.approx(0.030)
    assert luck.worthwhile({"a": 8}, 1) == {}, "however sure they are"
    calls = 0
    while not luck.worthwhile({"a": 8}, 1):
        luck.without(1, 0.010)
        calls += 1
        assert calls < 1000
    assert calls > 100
    luck.made(1, n_guesses=2, ahead=[2], seconds=0.0125)
    assert luck.debt_s < LOAN * 0.010, "what comes true pays it off"
    for _ in range(3):
        luck.made(1, n_guesses=8, ahead=[8], seconds=0.020)
    assert luck.debt_s == 0
    assert luck.affords_s(1) > READ_LOAN * 0.010


def test_an_accident_is_not_a_debt():
    luck = lucky(paced(n1=0.010, n9=0.020), "a", right=True)
    luck.made(1, n_guesses=4, ahead=[4], seconds=9.0)
    assert luck.debt_s < 0.1


def test_now_and_then_a_call_without_guesses_says_what_those_take():
    pace = paced(n1=0.010, n9=0.011)
    luck = lucky(pace, "a", right=True)
    made = []
    for _ in range(100):
        made.append(bool(luck.worthwhile({"a": 8}, 1)))
        pace.learn(n_writing=1, n_prompt=0, n_guesses=8 * made[-1], seconds=0.011 if made[-1] else 0.010)
    assert 1 <= made.count(False) <= 5


def test_what_must_be_read_first_counts_as_time():
    luck = lucky(paced(n1=0.010, n8=0.011), "a", right=True)
    assert luck.worthwhile({"a": 7}, 1, before_s={"a": 0.001})
    assert luck.worthwhile({"a": 7}, 1, before_s={"a": 0.5}) == {}
    before = luck.affords_s(1)
    luck.spent(0.015)
    assert luck.affords_s(1) == pytest.approx(before - 0.015)
