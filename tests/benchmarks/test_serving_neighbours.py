"""What clients do to one another, reckoned from rounds that are written down by hand."""

import pytest

from benchmarks.serving.load import Round
from benchmarks.serving.neighbours import (
    beside_flood,
    beside_long,
    by_weight,
    saturated,
    steps_until_freed,
    those_who_stay,
)
from benchmarks.serving.progress import chars_per_token, moment, rate, written
from tests.benchmarks.made_up import answered, left

WEIGHTS = {"heavy": 3.0, "light": 1.0}


def every(step_s: float, n: int, *, since_s: float = 0.0) -> list[float]:
    """n stamps, one a step."""
    return [since_s + step_s * (k + 1) for k in range(n)]


# Progress


def test_tokens_are_spread_over_chunks_by_their_characters():
    stream = answered(1.0, 2.0, 3.0, tokens=10, sizes=[4, 32, 4])
    assert written([stream], until_s=1.0) == 1.0
    assert written([stream], until_s=2.5) == 9.0
    assert written([stream], since_s=1.0, until_s=3.0) == 9.0


def test_tokens_of_one_that_was_left_are_reckoned_from_the_others():
    whole, gone = answered(1.0, 2.0, tokens=4), left(1.0, 1.5, 2.0, ended_s=2.0)
    assert chars_per_token([whole, gone]) == 2.0
    assert written([whole, gone], until_s=2.0) == 4 + 6


def test_without_a_finished_answer_nothing_is_known_of_tokens():
    gone = left(1.0, 2.0, ended_s=2.0)
    assert written([gone], until_s=2.0) == 0.0
    assert rate([gone], since_s=0.0, until_s=2.0) is None


def test_an_empty_window_has_no_rate():
    assert rate([answered(1.0, 2.0)], since_s=2.0, until_s=2.0) is None


def test_a_moment_is_that_of_the_chunk_which_completes_the_tokens():
    both = [answered(1.0, 3.0), answered(2.0, 4.0)]
    assert moment(both, 3) == 3.0
    assert moment(both, 5) is None


# Beside a long prompt


def test_beside_a_long_prompt_only_gaps_until_its_first_token_count():
    long = answered(4.0, 4.1, sent_s=2.0, group="long")
    stream = answered(0.5, 1.9, 2.5, 3.9, 9.0, group="streams")
    figures = beside_long(Round([stream, long]))
    assert figures["long_ttft_s"] == 2.0
    assert figures["gap_s"] == pytest.approx(5.1)  # it began before the long prompt's first token
    before = answered(0.5, 1.9, 2.5, 3.9, group="streams")
    assert beside_long(Round([before, long]))["gap_s"] == pytest.approx(1.4)


# Those who stay


def test_those_who_left_count_neither_as_failed_nor_as_throughput():
    gone = left(0.5, ended_s=0.5, group="leave")
    figures = those_who_stay(Round([answered(1.0, 2.0, tokens=30, group="stay"), gone], freed_s=0.04))
    assert figures["others_tokens_per_s"] == 15.0
    assert figures["failed"] == 0
    assert figures["freed_s"] == 0.04


def stayers(step_s: float, *, before: int = 0, slow_s: float = 0.0) -> list:
    """Two streams: some tokens at a slow step, then twenty at another."""
    stamps = every(slow_s, before)
    stamps += every(step_s, 20, since_s=stamps[-1] if stamps else 0.0)
    return [answered(*stamps, group="stay", client=number) for number in range(2)]


def test_the_rate_after_the_departures_is_compared_from_the_same_place_on():
    gone = left(0.2, 0.4, ended_s=2.0, group="leave")
    beside = Round([*stayers(0.125, before=10, slow_s=0.2), gone], freed_s=0.0)
    alone = Round(stayers(0.1, before=10, slow_s=0.05))
    figures = those_who_stay(Round(beside.outcomes, freed_s=0.0, without=alone))
    assert figures["unchanged"] == pytest.approx(0.8)  # 16 tokens/s where nobody else came 20


def test_slots_that_are_let_go_late_are_seen_in_both_figures():
    gone = left(0.2, 0.4, ended_s=2.0, group="leave")
    beside = [*stayers(0.125, before=10, slow_s=0.2), gone]
    figures = those_who_stay(Round(beside, freed_s=0.4, without=Round(stayers(0.125))))
    assert figures["freed_steps"] == 3.0
    assert figures["unchanged"] == pytest.approx(1.0, abs=0.05)


def test_a_step_that_ran_when_they_left_is_the_only_one_before_they_are_let_go():
    stay = [answered(1.0, 1.1, 1.2, 1.3, group="stay")]
    gone = left(1.0, ended_s=1.15, group="leave")
    assert steps_until_freed(Round([*stay, gone], freed_s=0.06), stay) == 1.0


@pytest.mark.parametrize("freed_s", [None, 0.04])
def test_what_was_never_let_go_or_never_left_has_no_figures(freed_s):
    stay = stayers(0.1)
    gone = [] if freed_s else [left(0.5, ended_s=0.5, group="leave")]
    figures = those_who_stay(Round([*stay, *gone], freed_s=freed_s, without=Round(stayers(0.1))))
    assert figures["freed_steps"] is None
    assert figures["unchanged"] is None


def test_failures_of_the_round_without_them_count_too():
    broken = answered(1.0, group="stay")
    broken.failure = "http"
    figures = those_who_stay(Round(stayers(0.1), without=Round([broken])))
    assert figures["failed"] == 1


# Keys of several weights


def keyed(key: str, client: int, *, step_s: float, turns: int = 2) -> list:
    """A client that asks twenty tokens at a time, without a pause."""
    asked = []
    for turn in range(turns):
        sent_s = turn * 20 * step_s
        stamps = every(step_s, 20, since_s=sent_s)
        asked.append(answered(*stamps, sent_s=sent_s, group=key, client=client, turn=turn))
    return asked


def test_keys_are_compared_while_all_of_them_want_more():
    heavy, light = keyed("heavy", 0, step_s=0.1), keyed("light", 1, step_s=0.3)
    figures = by_weight(Round([*heavy, *light]), WEIGHTS)
    assert figures["tokens_ratio"] == pytest.approx(40 / 13)
    assert figures["off_weights"] == pytest.approx(100 * (40 / 39 - 1))


def test_equal_shares_are_far_off_three_to_one():
    figures = by_weight(Round([*keyed("heavy", 0, step_s=0.1), *keyed("light", 1, step_s=0.1)]), WEIGHTS)
    assert figures["tokens_ratio"] == pytest.approx(1.0)
    assert figures["off_weights"] == pytest.approx(200 / 3)


def test_what_comes_after_the_first_client_is_through_counts_no_more():
    heavy = [*keyed("heavy", 0, step_s=0.1), *keyed("heavy", 2, step_s=0.2)]
    assert saturated([*heavy, *keyed("light", 1, step_s=0.3)], first="heavy") == (0.0, 4.0)


def test_a_key_that_gets_nothing_has_no_ratio():
    starved = left(9.0, ended_s=9.0, group="light", client=1)
    figures = by_weight(Round([*keyed("heavy", 0, step_s=0.1), starved]), WEIGHTS)
    assert figures["tokens_ratio"] is None
    assert figures["off_weights"] is None


# A flood


def single(*waits: float) -> list:
    return [answered(float(n) + wait, sent_s=float(n), group="single") for n, wait in enumerate(waits)]


def test_waits_beside_a_flood_are_told_as_multiples_of_those_without():
    flood = answered(30.0, group="flood", client=1)
    figures = beside_flood(Round([*single(0.3, 0.6), flood], without=Round(single(0.1, 0.2))))
    assert figures["single_ttft_s"] == pytest.approx(0.6)
    assert figures["alone_ttft_s"] == pytest.approx(0.2)
    assert figures["ttft_of_alone"] == pytest.approx(3.0)


def test_single_requests_that_all_fail_give_no_multiple():
    broken = single(0.3)
    broken[0].failure = "http"
    figures = beside_flood(Round(broken, without=Round(single(0.1))))
    assert figures["ttft_of_alone"] is None
    assert figures["failed"] == 1
