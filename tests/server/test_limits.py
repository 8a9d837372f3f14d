"""Buckets, accounts and the tokens of a request, under a clock that the test holds."""

import pytest

from engine.request import Tenant
from server.errors import RequestOverRate, TokensUsedUp, TooManyRequests
from server.limits import Account, Bucket, Policy, Usage, duration


def account(**limits) -> Account:
    return Account(Policy(name="alice", **limits), now=0.0)


def test_a_bucket_starts_full_refills_evenly_and_never_overflows():
    bucket = Bucket(600, now=0)
    assert bucket.level(0) == 600
    bucket.take(600, 0)
    assert bucket.level(0) == 0
    assert bucket.level(1) == pytest.approx(10)
    assert bucket.level(30) == pytest.approx(300)
    assert bucket.level(10_000) == 600
    bucket.take(-50, 10_000)
    assert bucket.level(10_000) == 600


def test_a_debt_is_paid_off_before_anything_is_there():
    bucket = Bucket(600, now=0)
    bucket.take(700, 0)
    assert bucket.level(0) == -100
    assert bucket.rate(0).remaining == 0
    assert bucket.wait_s(1, 0) == pytest.approx(10.1)
    assert bucket.wait_s(600, 0) == pytest.approx(70)
    assert bucket.wait_s(1, 10.1) == 0


def test_a_clock_that_steps_back_neither_fills_nor_drains():
    bucket = Bucket(600, now=100)
    bucket.take(600, 100)
    assert bucket.level(50) == 0
    assert bucket.level(101) == pytest.approx(10)


@pytest.mark.parametrize("per_minute", [1, 7, 599, 10**9])
def test_after_the_wait_that_was_told_the_tokens_are_there(per_minute):
    bucket = Bucket(per_minute, now=0.1)
    now = 0.1
    for wanted in (1, (per_minute + 1) // 2, per_minute):
        bucket.take(per_minute, now)
        now += bucket.wait_s(wanted, now) + 1e-6
        assert bucket.wait_s(wanted, now) == 0


def test_open_requests_are_bounded_and_one_that_leaves_makes_room():
    alice = account(max_requests=2)
    alice.enter(0)
    alice.enter(0)
    with pytest.raises(TooManyRequests, match="'alice' may have 2 requests") as error:
        alice.enter(0)
    assert error.value.retry_after_s == 1
    assert alice.n_open == 2
    alice.leave()
    alice.enter(0)


def test_without_limits_everything_is_let_in():
    alice = account()
    for _ in range(1000):
        alice.enter(0)
    assert alice.reserve(10**9, 10**9, 0) == 0


def test_tokens_are_reserved_for_prompt_and_answer_until_the_bucket_is_empty():
    alice = account(tokens_per_minute=600)
    assert alice.reserve(100, 200, 0) == 300
    assert alice.reserve(300, 0, 0) == 300
    with pytest.raises(
        TokensUsedUp, match=r"600 tokens a minute.*: 50 for this request are there in 5 s"
    ) as error:
        alice.reserve(50, 0, 0)
    assert error.value.retry_after_s == 5
    assert alice.reserve(50, 0, 5) == 50


def test_an_empty_bucket_refuses_before_the_size_of_a_request_is_known():
    alice = account(tokens_per_minute=600)
    alice.reserve(599, 0, 0)
    alice.enter(0)
    alice.reserve(1, 0, 0)
    with pytest.raises(TokensUsedUp) as error:
        alice.enter(0)
    assert error.value.retry_after_s == 1
    assert alice.n_open == 1
    alice.enter(1)


def test_a_long_max_tokens_asks_for_no_more_than_a_full_bucket():
    alice = account(tokens_per_minute=600)
    assert alice.reserve(10, 100_000, 0) == 600
    with pytest.raises(TokensUsedUp) as error:
        alice.reserve(10, 100_000, 30)
    assert error.value.retry_after_s == 30
    assert alice.reserve(10, 100_000, 60) == 600


def test_a_prompt_larger_than_the_bucket_is_refused_for_good():
    alice = account(tokens_per_minute=600)
    with pytest.raises(
        RequestOverRate, match=r"600 tokens.*'alice'.*600 a minute.*tokens_per_minute"
    ) as error:
        alice.reserve(600, 1, 0)
    assert error.value.retry_after_s is None
    assert alice.bucket is not None
    assert alice.bucket.level(0) == 600
    assert alice.reserve(599, 1, 0) == 600


def test_the_key_of_nobody_is_not_called_by_an_empty_name():
    everybody = Account(Policy(max_requests=1), 0)
    everybody.enter(0)
    with pytest.raises(TooManyRequests, match=r"^everybody together may"):
        everybody.enter(0)


def test_a_policy_tells_the_engine_its_part():
    policy = Policy(name="alice", weight=3, priority=2, max_running=5, max_requests=1, ttft_s=1)
    assert policy.tenant == Tenant("alice", 3, 2, 5)
    assert Policy().tenant == Tenant()


def test_no_invented_salt_leads_into_the_cache_of_another_key():
    alone, shared, other = (Policy("a", isolated_cache=True), Policy("b"), Policy("c", isolated_cache=True))
    own = alone.salt("")
    tried = ["", "x", own, "key:a\n", "a", "a\n", "any\n"]
    assert own not in {shared.salt(text) for text in tried} | {other.salt(text) for text in tried}
    assert alone.salt("x") not in {own, alone.salt("y"), shared.salt("x"), other.salt("x")}
    assert shared.salt("") == Policy("d").salt("") == ""
    assert shared.salt("x") == Policy("d").salt("x") != ""


def test_usage_counts_what_came_and_believes_the_end():
    usage = Usage((10, 20), n_choices=2)
    assert (usage.total, usage.begun) == (30, False)
    usage.wrote(0, 2)
    usage.wrote(0, 1)
    usage.wrote(3, 5)
    assert (usage.prompt, usage.completion, usage.begun) == (30, 8, True)
    usage.ended(0, n_prompt=11, n_cached=4, n_completion=7)
    usage.ended(1, n_prompt=11, n_cached=9, n_completion=1)  # the same prompt: counted once
    assert (usage.prompt, usage.cached, usage.completion, usage.total) == (31, 4, 13, 44)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (0.0001, "1ms"), (0.25, "250ms"), (0.9995, "1s"), (1, "1s"), (7.656, "7.66s"),
        (59.999, "1m0s"), (90, "1m30s"), (3600.5, "60m0.5s"),
    ],
)  # fmt: skip
def test_durations_are_written_as_openai_writes_them(seconds, text):
    assert duration(seconds) == text


def test_the_headers_of_a_rate():
    bucket = Bucket(600, now=0)
    bucket.take(15, 0)
    assert bucket.rate(0).headers() == {
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "585",
        "x-ratelimit-reset-tokens": "1.5s",
    }


def test_a_prompt_is_counted_as_soon_as_the_engine_tells_its_size():
    usage = Usage((0, 0), n_choices=2)
    usage.wrote(0, 1, n_prompt=7)
    usage.wrote(1, 1, n_prompt=7)
    usage.wrote(0, 1)
    assert (usage.prompt, usage.completion) == (7, 3), "once, however many choices are written for it"
    usage.wrote(3, 1, n_prompt=9)
    assert usage.prompt == 7
    usage.wrote(2, 1, n_prompt=9)
    assert usage.prompt == 16
