"""Texts against those written alone, and memory against what was granted, from rounds written by hand."""

import asyncio
import json

import pytest

from benchmarks.serving import alone as alone_module
from benchmarks.serving import footprint as footprint_module
from benchmarks.serving.alone import Parting, Solo, Token, ask_alone, parted, partings
from benchmarks.serving.client import Exchange
from benchmarks.serving.footprint import Footprint, Sample, watched
from benchmarks.serving.load import Round
from benchmarks.serving.promises import as_alone, growth, memory
from tests.benchmarks.made_up import answered, left

MB = 1_000_000


def token(text: str, logprob: float = -0.1, **others: float) -> Token:
    likeliest = ((text.encode(), logprob), *((name.encode(), value) for name, value in others.items()))
    return Token(text.encode(), logprob, likeliest)


def solo(*tokens: Token, client: int = 0, failure: str | None = None) -> Solo:
    return Solo(client, 0, tokens, failure)


# Texts


def test_the_same_text_does_not_part():
    assert parted("in the sea", solo(token("in"), token(" the"), token(" sea"))) is None


def test_a_text_parts_at_its_first_other_token_by_the_gap_of_the_two():
    tokens = [token("in"), token("to", -0.70, land=-3.0, wards=-0.74), token(" it")]
    parting = parted("inwards", solo(*tokens))
    assert parting is not None
    assert parting.at_byte == 2
    assert parting.gap == pytest.approx(0.04)


def test_the_likeliest_of_the_tokens_that_fit_gives_the_gap():
    parting = parted("abc", solo(token("x", -0.5, a=-2.0, ab=-0.6)))
    assert parting is not None
    assert parting.gap == pytest.approx(0.1)


def test_a_token_that_was_not_among_the_likeliest_has_no_gap():
    assert parted("quite another", solo(token("in", the=-3.0))) == Parting(0, 0, 0, None)


@pytest.mark.parametrize("text", ["in", "in the sea and on"])
def test_a_text_that_ends_elsewhere_parts_without_a_gap(text):
    parting = parted(text, solo(token("in"), token(" the"), token(" sea")))
    assert parting is not None
    assert parting.gap is None


def test_a_character_that_is_cut_at_the_end_is_the_same_text():
    cut = Token("é".encode()[:1], -0.1)
    assert parted("caf\N{REPLACEMENT CHARACTER}", solo(token("caf"), cut)) is None


def test_only_answers_are_compared_and_each_with_its_own():
    texts = [answered(1.0, client=0, text="a"), answered(1.0, client=1, text="b")]
    gone = left(1.0, ended_s=1.0, client=2, text="x")
    alone = [solo(token(text), client=number) for number, text in enumerate("abc")]
    assert partings([*texts, gone], alone) == []
    assert [each.client for each in partings(texts, list(reversed(alone)))] == []


def test_who_failed_alone_counts_as_a_text_that_parts():
    assert len(partings([answered(1.0, text="a")], [solo(failure="500")])) == 1
    assert len(partings([answered(1.0, text="")], [solo(failure="500")])) == 1


def test_only_close_calls_are_excused():
    texts = [answered(1.0, client=number, text="b") for number in range(4)]
    gaps = (-0.14, -0.16, -2.0)
    alone = [solo(token("a", -0.1, b=value), client=number) for number, value in enumerate(gaps)]
    figures = as_alone(Round(texts, alone=(*alone, solo(token("b"), client=3))))
    assert figures["differing"] == 3
    assert figures["unexcused"] == 2
    assert figures["parting_gap"] == pytest.approx(1.9)


def test_texts_that_differ_alone_are_counted_apart():
    alone = [solo(token(text), client=number) for number, text in enumerate("abc")]
    again = [solo(token("a"), client=0), solo(token("x"), client=1), solo(failure="500", client=2)]
    figures = as_alone(Round([answered(1.0, text="a")], alone=tuple(alone), again=tuple(again)))
    assert figures["differing"] == 0
    assert figures["unlike_again"] == 2


def test_a_round_that_was_not_asked_alone_says_nothing_of_texts():
    assert "differing" not in as_alone(Round([answered(1.0)]))


def served(monkeypatch, status: int | None, body: bytes) -> list[bytes]:
    """Every request gets this; returns the requests' bytes."""
    asked: list[bytes] = []

    async def exchanged(_port, request, **_):
        asked.append(request)
        if status is None:
            return None
        exchange = Exchange(request)
        exchange.status, exchange.finished, exchange.body = status, True, bytearray(body)
        return exchange

    monkeypatch.setattr(alone_module, "exchanged", exchanged)
    return asked


def asked_alone() -> Solo:
    body = {"messages": [], "max_tokens": 2, "stream": True, "stream_options": {}}
    return asyncio.run(ask_alone(1, body, client=3, turn=1, key="k", timeout_s=1))


def test_alone_each_request_has_a_cache_of_its_own_and_tells_its_likeliest_tokens(monkeypatch):
    entry = {"token": "é", "bytes": [195, 169], "logprob": -0.5}
    top = [{"token": "e", "bytes": [101], "logprob": -0.75}]
    answer = {"choices": [{"logprobs": {"content": [entry | {"top_logprobs": top}]}}]}
    asked = served(monkeypatch, 200, json.dumps(answer).encode())
    assert asked_alone() == Solo(3, 1, (Token("é".encode(), -0.5, ((b"e", -0.75),)),))
    body = json.loads(asked[0].partition(b"\r\n\r\n")[2])
    assert "stream" not in body
    assert body["cache_salt"] == "alone-3-1"
    assert b"Authorization: Bearer k\r\n" in asked[0]


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [(None, b"", "no answer"), (500, b"no cells", "no cells"), (200, b"{}", "choices"), (200, b"<", "JSON")],
)
def test_an_answer_that_cannot_be_had_alone_is_a_failure_that_is_told(monkeypatch, status, body, told):
    served(monkeypatch, status, body)
    failure = asked_alone().failure
    assert failure is not None
    assert told in failure


# Memory


def held(*sizes_mb: float, cached: int | None = None) -> Footprint:
    """Samples after every 100 requests."""
    samples = tuple(
        Sample(float(n), 100 * (n + 1), int(size * MB), cached) for n, size in enumerate(sizes_mb)
    )
    return Footprint(samples, 300 * MB)


def test_memory_is_told_at_its_peak_and_beyond_what_was_granted():
    figures = memory(Round([], footprint=held(100, 720, 650, 650)))
    assert figures["peak_mb"] == 720
    assert figures["beyond_budget_mb"] == 420


def test_growth_is_of_the_second_half_alone():
    seen = held(10, 200, 300, 400, 500, 500, 500, 500, 503, 507)
    assert growth(seen, lambda sample: sample.held_bytes) == pytest.approx(5.0)


def test_a_cache_that_fills_up_within_its_budget_is_no_leak():
    sizes = [100.0, 100.0, 100.0, 100.0, 140.0, 140.0, 150.0, 160.0, 175.0, 185.0]
    samples = tuple(
        Sample(float(n), 100 * (n + 1), int(size * MB), int((size - 90 - n) * MB))
        for n, size in enumerate(sizes)
    )
    figures = memory(Round([], footprint=Footprint(samples, 300 * MB)))
    assert figures["growth_mb"] == pytest.approx(40)
    assert figures["cache_growth_mb"] == pytest.approx(36)
    assert figures["leak_mb"] == pytest.approx(4)


def test_a_server_that_tells_no_budgets_has_a_peak_all_the_same():
    figures = memory(Round([], footprint=Footprint((Sample(0.0, 1, 5 * MB),))))
    assert figures["peak_mb"] == 5
    assert figures["beyond_budget_mb"] is None
    assert figures["cache_growth_mb"] is None
    assert figures["leak_mb"] is None


def test_an_unwatched_round_says_nothing_of_memory():
    assert "peak_mb" not in memory(Round([]))


def watch(monkeypatch, body: bytes) -> Footprint:
    """Two samples of a server that answers this at /v1/engine."""
    monkeypatch.setattr(footprint_module, "SAMPLE_S", 0.0)
    looks = iter([False, False, True, True, True])

    async def get(_port, path, **_):
        return body if path == "/v1/engine" else b""

    monkeypatch.setattr(footprint_module, "get", get)
    return asyncio.run(
        watched(1, lambda: 7, None, origin=0.0, n_ended=lambda: 3, over=lambda: next(looks, True))
    )


def test_a_watch_ends_with_a_last_look_after_the_round(monkeypatch):
    memory = {"weights_bytes": 1, "kv_bytes": 2, "cache_bytes": 4, "compute_bytes": 8}
    engine = {"memory": memory, "stats": {"cache_ram_bytes": 3}}
    seen = watch(monkeypatch, json.dumps({"data": [engine, {"memory": memory, "stats": None}]}).encode())
    assert seen.budget_bytes == 14
    assert len(seen.samples) == 2
    assert {(each.held_bytes, each.n_ended, each.cached_bytes) for each in seen.samples} == {(7, 3, 3)}


def test_a_server_without_the_route_is_watched_from_outside(monkeypatch):
    seen = watch(monkeypatch, b"")
    assert seen.budget_bytes is None
    assert seen.samples[-1].cached_bytes is None
