"""Guesses on the real model: the same text in fewer calls, by the prompt's own words or a draft model."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from engine.drafter import Drafter, check_vocabulary
from engine.llama import Context, DecodeFailed, Model
from engine.lookup import Lookup
from engine.loop import Loop
from engine.luck import GUESSES_A_SEQUENCE
from engine.pace import Pace
from engine.request import Done, GenerationRequest, ModelLoadFailed, Sampling

LIST = "Copy this list. alpha beta gamma delta epsilon zeta eta theta iota kappa\nalpha beta gamma"
GREEDY = Sampling(temperature=0)


class Flat(Pace):
    """Calls take the same time whatever they hold, so that every guess with a chance is worth making."""

    def writing_s(self, n_writing: int) -> float:
        return 10.0 if n_writing else 0.0

    def guessing_s(self, n_writing: int, n_guesses: int, *, even: bool = True) -> float:  # noqa: ARG002
        return self.writing_s(n_writing + n_guesses)


@pytest.fixture
def make(model: Model):
    """A function: guesses, a draft model or none -> a loop of two sequences."""
    closing = []

    def made(*, guesses: int = 16, drafter: Drafter | None = None) -> Loop:
        context = Context.open(
            model, n_ctx=512, n_batch=64, n_seq_max=2, n_outputs_max=2 + guesses, n_threads=1
        )
        loop = Loop(model, context, n_ctx=256, n_parallel=2, pace=Flat(), guesses=guesses, drafter=drafter)
        closing.extend([loop, context])
        return loop

    yield made
    for each in closing:
        each.close()


def run(loop: Loop, *requests: GenerationRequest) -> list[str]:
    texts = [""] * len(requests)
    for id, request in enumerate(requests):
        loop.submit(id, request)
    while not loop.idle:
        for id, event in loop.step():
            assert isinstance(id, int)
            texts[id] += getattr(event, "text", "")
    return texts


def ask(prompt: str = LIST, **options) -> GenerationRequest:
    return GenerationRequest(prompt, **({"sampling": GREEDY, "max_tokens": 24} | options))


def test_quoted_text_comes_in_fewer_calls_and_is_the_same(make):
    plain, quick = make(guesses=0), make()
    assert run(quick, ask()) == run(plain, ask())
    stats = quick.stats()
    assert stats.decode_steps_total < 0.7 * plain.stats().decode_steps_total
    assert 0 < stats.right_guesses_total <= stats.guessed_tokens_total
    assert plain.stats().guessed_tokens_total == 0


def test_sampled_text_of_a_seed_is_the_same_with_guesses(make):
    request = ask(sampling=Sampling(temperature=0.7, seed=5))
    assert run(make(), request) == run(make(guesses=0), request)


def test_penalties_and_grammars_hold_over_guesses(make):
    request = ask(sampling=Sampling(temperature=0, repeat_penalty=1.3))
    assert run(make(), request) == run(make(guesses=0), request)
    grammar = 'root ::= ("alpha " | "beta " | "gamma ")+'
    request = ask(sampling=Sampling(temperature=0, grammar=grammar), max_tokens=12)
    (text,) = run(make(), request)
    assert [text] == run(make(guesses=0), request)
    assert set(text.split()) <= {
        "alpha",
        "beta",
        "gamma",
        "alp",
        "bet",
        "gam",
        "g",
        "a",
        "b",
        "al",
        "be",
        "ga",
    }


def test_stop_strings_and_log_probabilities_come_as_without_guesses(make):
    request = ask(stop=("theta",), logprobs=1)
    quick, plain = make(), make(guesses=0)
    assert run(quick, request) == run(plain, request)
    assert "theta" not in run(quick, request)[0]


def test_two_sequences_guess_side_by_side(make):
    other = LIST.replace("alpha", "one").replace("beta", "two")
    assert run(make(), ask(), ask(other)) == run(make(guesses=0), ask(), ask(other))


@pytest.fixture
def drafter(model: Model):
    """The model drafts for itself: every guess is right."""
    with Context.open(model, n_ctx=512, n_batch=256, n_seq_max=2, n_outputs_max=2, n_threads=1) as context:
        yield Drafter(context)


def test_a_draft_model_that_is_right_makes_few_calls_do(make, drafter):
    request = ask("Write a poem about the sea:", max_tokens=32, ignore_eos=True)
    plain, quick = make(guesses=0), make(drafter=drafter)
    assert run(quick, request, request) == run(plain, request, request)
    assert quick.stats().decode_steps_total < 0.6 * plain.stats().decode_steps_total


def test_a_draft_model_reads_along_when_slots_change_hands(make, drafter):
    loop = make(drafter=drafter)
    requests = [ask(f"Number {i} of the list is", max_tokens=12, ignore_eos=True) for i in range(5)]
    assert run(loop, *requests) == run(make(guesses=0), *requests)


def test_a_draft_model_guesses_no_further_than_the_context(make, drafter, monkeypatch):
    monkeypatch.setattr(Lookup, "guess", lambda *_: [])
    asked: list[int] = []
    extend = drafter.guess
    monkeypatch.setattr(drafter, "guess", lambda counts: asked.extend(counts.values()) or extend(counts))
    prompt = tuple(range(1000, 1234))
    request = GenerationRequest(prompt, sampling=GREEDY, max_tokens=None, ignore_eos=True)
    loop = make(drafter=drafter)
    loop.submit("fills it", request)
    (*_, (_, done)) = (output for _ in range(40) if not loop.idle for output in loop.step())
    assert isinstance(done, Done)
    assert (done.finish_reason, done.n_completion_tokens) == ("length", 256 - len(prompt))
    assert min(asked) < GUESSES_A_SEQUENCE == max(asked)


def test_a_draft_model_that_fails_costs_its_guesses_and_nothing_else(make, drafter, monkeypatch):
    monkeypatch.setattr(Lookup, "guess", lambda *_: [])  # or the text's own words would guess meanwhile
    decode, calls = drafter.context.decode, []

    def fails_at_times():
        calls.append(len(drafter.context.batch))
        if len(calls) in (1, 4, 9):
            raise DecodeFailed(1)
        decode()

    monkeypatch.setattr(drafter.context, "decode", fails_at_times)
    request = ask("Write a poem about the sea:", ignore_eos=True)
    quick = make(drafter=drafter)
    assert run(quick, request, request) == run(make(guesses=0), request, request)
    assert len(calls) > 9
    stats = quick.stats()
    assert stats.failed_total == 0
    assert stats.right_guesses_total > 0.9 * stats.guessed_tokens_total > 0, "it reads what it forgot"


@pytest.mark.parametrize("n_vocab", [99, 100])
def test_a_draft_model_of_another_vocabulary_is_refused(n_vocab):
    def stub(name: str, n_vocab: int):
        pieces = {"piece": lambda token, **_: f"{name}{token}".encode(), "token_text": lambda t: f"{name}{t}"}
        return SimpleNamespace(n_vocab=n_vocab, path=Path(f"{name}.gguf"), **pieces)

    target = stub("large", 100)
    check_vocabulary(target, target)
    with pytest.raises(ModelLoadFailed, match="same family"):
        check_vocabulary(stub("small", n_vocab), target)
