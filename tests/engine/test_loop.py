"""The loop over the real model: equivalence of batched and single runs, limits, cancellation, failures."""

from types import SimpleNamespace

import pytest

from engine.llama import Context, DecodeFailed
from engine.loop import Loop
from engine.request import (
    ContextOverflow,
    Delta,
    EngineError,
    GenerationRequest,
    InvalidRequest,
    QueueFull,
    Sampling,
)

GREEDY = Sampling(temperature=0)


def ask(prompt: str | tuple[int, ...] = "The capital of France is", **options) -> GenerationRequest:
    return GenerationRequest(prompt, **({"sampling": GREEDY, "max_tokens": 8} | options))


SUBJECTS = (
    "rain", "iron", "bread", "the moon", "music", "a bridge", "salt", "wool",
    "glass", "a river", "honey", "paper", "fire", "an owl", "clocks", "the sea",
)  # fmt: skip


def test_batched_greedy_tokens_equal_one_by_one(make_loop, drain):
    requests = [ask(f"Write about {subject}:", max_tokens=16, logprobs=2) for subject in SUBJECTS]
    together = drain(make_loop(n_parallel=16), *requests)
    loop = make_loop(n_parallel=1)
    for request, batched in zip(requests, together, strict=True):
        (alone,) = drain(loop, request)
        assert_same(batched, alone)


def test_a_shared_prefix_changes_no_greedy_token(make_loop, drain):
    stem = "The handbook says that every employee may take twenty days of leave a year. " * 5
    requests = [ask(stem + f"Question about {subject}:", logprobs=2) for subject in SUBJECTS[:6]]
    together = drain(make_loop(n_ctx=256, n_parallel=3), *requests)
    assert all(answer.done.n_cached_tokens > 70 for answer in together[1:])
    for request, shared in zip(requests, together, strict=True):
        (alone,) = drain(make_loop(n_ctx=256, n_parallel=1), request)
        assert alone.done.n_cached_tokens == 0
        assert_same(shared, alone)


def test_how_prompts_are_cut_and_what_is_beside_them_changes_no_bit(model, drain):
    requests = [
        ask(f"Write about {subject}: " + f"{subject} " * 5 * n, max_tokens=12, logprobs=2, cache_salt=subject)
        for n, subject in enumerate(SUBJECTS)
    ]
    answers = {}
    for n_slots, n_batch, n_threads in ((16, 100, 2), (16, 23, 1), (1, 512, 2)):
        options = {"n_ctx": 256 * n_slots, "n_batch": n_batch, "n_seq_max": n_slots, "n_threads": n_threads}
        with Context.open(model, **options) as context:
            loop = Loop(model, context, n_ctx=256, n_parallel=n_slots)
            calls = [requests] if n_slots > 1 else [[request] for request in requests]
            answers[n_batch] = [answer for some in calls for answer in drain(loop, *some)]
            loop.close()
    for large, small, alone in zip(answers[100], answers[23], answers[512], strict=True):
        assert_same(large, alone)
        assert_same(small, alone)


def assert_same(batched, alone) -> None:
    """Equal to the last bit: a sequence's cells lie in order, and no kernel depends on its neighbours."""
    assert batched.tokens == alone.tokens
    assert batched.text == alone.text
    assert [detail.logprob for detail in batched.logprobs] == [detail.logprob for detail in alone.logprobs]


def test_text_is_what_the_tokens_say(make_loop, drain, model):
    (answer,) = drain(make_loop(), ask(max_tokens=12))
    assert answer.text == b"".join(model.piece(token) for token in answer.tokens).decode()
    assert answer.done.n_completion_tokens == 12
    assert answer.done.finish_reason == "length"
    n_prompt = len(model.tokenize("The capital of France is"))
    assert answer.done.n_prompt_tokens == n_prompt
    assert [delta.n_prompt_tokens for delta in answer.deltas] == [n_prompt, *[0] * 11], "told once, at first"


def test_max_tokens_none_writes_until_the_context_is_full(make_loop, drain, model):
    (answer,) = drain(make_loop(n_ctx=32), ask(max_tokens=None, ignore_eos=True))
    n_prompt = len(model.tokenize("The capital of France is"))
    assert answer.done.finish_reason == "length"
    assert n_prompt + answer.done.n_completion_tokens == 32


def test_a_prompt_one_token_short_of_the_context_gets_one_token(make_loop, drain):
    (answer,) = drain(make_loop(n_ctx=32), ask(tuple(range(100, 131)), max_tokens=10))
    assert answer.done.n_completion_tokens == 1
    assert answer.done.finish_reason == "length"


def test_a_prompt_that_fills_the_context_fails_alone(make_loop):
    loop = make_loop(n_ctx=32)
    loop.submit("good", ask())
    with pytest.raises(ContextOverflow) as caught:
        loop.submit("bad", ask(tuple(range(100, 132))))
    assert (caught.value.n_prompt_tokens, caught.value.n_ctx) == (32, 32)
    outputs = []
    while not loop.idle:
        outputs += loop.step()
    assert {id for id, _ in outputs} == {"good"}


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (ask((10**6,)), "prompt"),
        (ask(sampling=Sampling(logit_bias=((10**6, 1.0),))), "logit_bias"),
        (ask(sampling=Sampling(grammar="root ::= nothing")), "grammar"),
        (ask(max_tokens=0), "max_tokens"),
    ],
)
def test_a_refused_request_leaves_nothing_behind(make_loop, request_, field):
    loop = make_loop()
    with pytest.raises(InvalidRequest) as caught:
        loop.submit(1, request_)
    assert caught.value.field == field
    assert loop.idle
    assert loop.stats().requests_total == 0


def test_a_stop_string_ends_the_text_before_it(make_loop, drain):
    (whole,) = drain(make_loop(), ask(max_tokens=16))
    stop = whole.text[5:9]
    (answer,) = drain(make_loop(), ask(max_tokens=16, stop=(stop,)))
    assert answer.text == whole.text[: whole.text.index(stop)]
    assert answer.done.finish_reason == "stop"
    assert answer.done.stop_string == stop


def test_the_end_token_stops_and_ignore_eos_does_not(make_loop, drain, model):
    eos = model.eos_id
    likely = Sampling(temperature=0, logit_bias=((eos, 1000.0),))
    (answer,) = drain(make_loop(), ask(sampling=likely))
    assert (answer.done.finish_reason, answer.done.stop_token) == ("stop", eos)
    assert (answer.text, answer.tokens) == ("", [])
    (answer,) = drain(make_loop(), ask(sampling=likely, ignore_eos=True))
    assert answer.done.finish_reason == "length"
    assert answer.done.n_completion_tokens == 8


def test_cached_tokens_are_counted(make_loop, drain, model):
    loop = make_loop()
    prompt = tuple(model.tokenize("One two three four five six seven eight nine ten"))
    (first,) = drain(loop, ask(prompt))
    (second,) = drain(loop, ask(prompt))
    assert first.done.n_cached_tokens == 0
    assert second.done.n_cached_tokens == len(prompt) - 1
    assert second.tokens == first.tokens
    stats = loop.stats()
    assert stats.cached_tokens_total == len(prompt) - 1
    assert stats.prompt_tokens_total == 2 * len(prompt)
    assert stats.completion_tokens_total == 16


def test_conversation_turns_start_from_the_earlier_answer(make_loop, drain, model):
    loop = make_loop()
    prompt = tuple(model.tokenize("Tell me of the sea."))
    (first,) = drain(loop, ask(prompt))
    longer = (*prompt, *first.tokens, *model.tokenize(" And then?"))
    (second,) = drain(loop, ask(longer))
    assert second.done.n_cached_tokens == len(prompt) + len(first.tokens) - 1


def test_cancel_frees_before_the_next_step(make_loop):
    loop = make_loop(n_parallel=1)
    loop.submit("running", ask(max_tokens=100))
    loop.submit("waiting", ask("Two and two are"))
    loop.submit("never", ask("Nobody hears"))
    loop.step()
    loop.cancel("running")
    loop.cancel("never")
    loop.cancel("unknown")
    assert loop.stats().running == 0
    outputs = loop.step()
    assert {id for id, _ in outputs} == {"waiting"}
    while not loop.idle:
        outputs += loop.step()
    assert {id for id, _ in outputs} == {"waiting"}
    assert loop.stats().cancelled_total == 2


def test_the_queue_is_full_beyond_slots_and_max_queue(make_loop):
    loop = make_loop(n_parallel=2, max_queue=1)
    for id in range(3):
        loop.submit(id, ask())
    with pytest.raises(QueueFull) as caught:
        loop.submit(3, ask())
    assert caught.value.retry_after_s >= 1
    loop.cancel(0)
    loop.submit(3, ask())


def test_no_queue_still_serves_the_slots(make_loop, drain):
    assert drain(make_loop(n_parallel=1, max_queue=0), ask())[0].done


def test_a_failed_call_is_run_again_in_parts(make_loop, drain, monkeypatch):
    requests = [ask(f"Write about {subject}:") for subject in SUBJECTS[:3]]
    expected = drain(make_loop(), *requests)
    loop = make_loop()
    decode, calls = loop.context.decode, []

    def fails_third():
        calls.append(len(loop.context.batch))
        if len(calls) == 3:
            raise DecodeFailed(1)
        decode()

    monkeypatch.setattr(loop.context, "decode", fails_third)
    answers = drain(loop, *requests)
    assert calls[2:6] == [3, 1, 1, 1]
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


def test_a_sequence_that_cannot_be_decoded_fails_alone(make_loop, drain, monkeypatch):
    loop = make_loop()
    decode = loop.context.decode
    requests = [ask(f"Write about {subject}:") for subject in SUBJECTS[:3]]

    def fails_with_the_second():
        bad = [s.slot for s in loop.scheduler.running if s.id == 1]
        if any(int(s[0]) in bad for s in loop.context.batch._sequences[: len(loop.context.batch)]):
            raise DecodeFailed(-3)
        decode()

    monkeypatch.setattr(loop.context, "decode", fails_with_the_second)
    answers = drain(loop, *requests)
    assert isinstance(answers[1].error, DecodeFailed)
    assert answers[0].done
    assert answers[2].done
    assert loop.stats().failed_total == 1
    monkeypatch.undo()
    assert drain(loop, requests[1])[0].done


def test_stats_count_cells(make_loop, model):
    loop = make_loop(n_parallel=2)
    loop.submit(1, ask(max_tokens=4))
    loop.step()
    n_prompt = len(model.tokenize("The capital of France is"))
    assert loop.stats().kv_cells_used == n_prompt
    while not loop.idle:
        loop.step()
    stats = loop.stats()
    assert (stats.kv_cells_used, stats.kv_cells_cached) == (0, n_prompt + 3)


def test_many_requests_in_few_slots_all_end(make_loop, drain):
    loop = make_loop(n_parallel=3)
    requests = [ask(f"Number {i} of", max_tokens=1 + i % 5, ignore_eos=True) for i in range(20)]
    answers = drain(loop, *requests)
    assert [answer.done.n_completion_tokens for answer in answers] == [1 + i % 5 for i in range(20)]


def test_the_pace_is_learnt_from_calls_and_not_from_what_comes_before_them(make_loop, monkeypatch):
    loop, now_s, learnt_s = make_loop(), [0.0], []

    def taking(seconds: float, action):
        def timed(*given, **options):
            now_s[0] += seconds
            return action(*given, **options)

        return timed

    monkeypatch.setattr("engine.loop.time", SimpleNamespace(perf_counter=lambda: now_s[0]))
    monkeypatch.setattr(loop.scheduler, "admit", taking(100, loop.scheduler.admit))
    monkeypatch.setattr(loop.context, "decode", taking(3, loop.context.decode))
    monkeypatch.setattr(loop.pace, "learn", lambda *, seconds, **_: learnt_s.append(seconds))
    loop.submit(1, ask(max_tokens=3, ignore_eos=True))
    while not loop.idle:
        loop.step()
    assert learnt_s == [3, 3, 3]
    assert loop.stats().busy_s == 3 * 103


def test_a_defect_in_one_sequences_sampler_fails_it_alone(make_loop, drain, monkeypatch, capfd):
    requests = [ask(f"Write about {subject}:") for subject in SUBJECTS[:3]]
    expected = drain(make_loop(), *requests)
    loop = make_loop()
    for id, request in enumerate(requests):
        loop.submit(id, request)
    broken, n_drawn = loop._writing[1].sampler, []
    sample = broken.sample

    def breaks(index: int) -> int:
        n_drawn.append(index)
        if len(n_drawn) == 3:
            raise ZeroDivisionError("a sampler's own")
        return sample(index)

    monkeypatch.setattr(broken, "sample", breaks)
    outputs: list = []
    while not loop.idle:
        outputs += loop.step()
    ends = {id: event for id, event in outputs if not isinstance(event, Delta)}
    assert type(ends[1]) is EngineError
    assert str(ends[1]) == "internal error: ZeroDivisionError: a sampler's own"
    assert "in breaks" in capfd.readouterr().err, "the place goes to stderr"
    for id in (0, 2):
        tokens = [
            token for each, event in outputs if each == id and type(event) is Delta for token in event.tokens
        ]
        assert tokens == expected[id].tokens
    assert loop.stats().failed_total == 1
    again = drain(loop, requests[1])[0]
    assert again.done.n_cached_tokens < 3, "what the broken one left is forgotten"
    assert again.tokens == expected[1].tokens


def test_a_defect_in_the_first_token_leaves_nothing_in_the_slot(make_loop, monkeypatch):
    loop = make_loop(n_parallel=1)
    loop.submit("broken", ask(stop=("never",)))

    def breaks(_):
        raise KeyError("stop")

    monkeypatch.setattr(loop._writing["broken"].stops, "step", breaks)
    ((id, error),) = loop.step()
    assert (id, type(error)) == ("broken", EngineError)
    assert loop.idle
    assert loop.context.length(0) == 0


def test_a_prompt_of_megabytes_is_refused_unread(make_loop, monkeypatch):
    loop, n_read = make_loop(n_ctx=128), []
    tokenize = loop.model.tokenize
    monkeypatch.setattr(
        loop.model, "tokenize", lambda text, **how: n_read.append(len(text)) or tokenize(text, **how)
    )
    with pytest.raises(ContextOverflow, match=r"at least \d+ tokens but the context holds 128"):
        loop.submit(1, ask("What is it? " * 800_000))
    assert sum(n_read) <= 100_000
    assert loop.idle
