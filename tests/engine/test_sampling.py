"""How the next token is chosen, over the real model's logits."""

import math

import numpy as np
import pytest

from engine.request import GenerationRequest, InvalidRequest, Sampling
from engine.sampling import NoTokenAllowed, Sampler, logprobs

PROMPT = "My favourite food is"


@pytest.fixture
def write(make_loop, drain):
    """A function: sampling options -> the answer, from an empty cache."""

    def write(*, max_tokens: int = 10, prompt=PROMPT, wanted: int | None = None, **options):
        request = GenerationRequest(prompt, Sampling(**options), max_tokens=max_tokens, logprobs=wanted)
        (answer,) = drain(make_loop(), request)
        if answer.error:
            raise answer.error
        return answer

    return write


@pytest.fixture
def index(model, context) -> int:
    """The batch entry whose logits follow PROMPT."""
    tokens = model.tokenize(PROMPT)
    context.batch.clear()
    last = context.batch.extend(tokens, start=0, sequence=0, output=True)
    context.decode()
    return last


def draws(context, index, sampling: Sampling, *, n: int = 50, prompt: tuple[int, ...] = (1,)) -> set[int]:
    """The tokens that many seeds draw from one set of logits."""
    found = set()
    for seed in range(n):
        options = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
        sampler = Sampler(context, Sampling(**options | {"seed": seed}), prompt=prompt)
        found.add(sampler.sample(index))
        sampler.close()
    return found


def test_a_seed_repeats_the_text_and_another_changes_it(write):
    first, again, other = (write(temperature=1.5, seed=seed) for seed in (7, 7, 8))
    assert first.tokens == again.tokens
    assert first.tokens != other.tokens


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1, 2**32 - 1, 2**32, 0])
def test_any_seed_repeats(write, seed):
    assert write(temperature=2.0, seed=seed, max_tokens=5).tokens == (
        write(temperature=2.0, seed=seed, max_tokens=5).tokens
    )


def test_without_a_seed_texts_differ(write):
    assert len({tuple(write(temperature=2.0, top_k=0, min_p=0).tokens) for _ in range(3)}) > 1


@pytest.mark.parametrize("temperature", [0, 1e-9, 1e-37])
def test_temperature_zero_and_nearly_zero_take_the_likeliest(context, index, temperature):
    likeliest = int(context.logits(index).argmax())
    assert draws(context, index, Sampling(temperature=temperature), n=5) == {likeliest}


def test_top_k_keeps_the_k_likeliest(context, index):
    best = set(np.argsort(-context.logits(index))[:3].tolist())
    assert draws(context, index, Sampling(temperature=100, top_k=3, top_p=1, min_p=0)) == best


def test_min_p_drops_what_is_unlikely_beside_the_best(context, index):
    logits = context.logits(index)
    allowed = set(np.nonzero(logits >= logits.max() + math.log(0.5))[0].tolist())
    assert draws(context, index, Sampling(temperature=100, top_k=0, top_p=1, min_p=0.5)) <= allowed


@pytest.mark.parametrize("options", [{"top_p": 0.0}, {"typical_p": 0.0}, {"top_k": 1}, {"min_p": 1.0}])
def test_the_tightest_cuts_keep_one_token(context, index, options):
    assert len(draws(context, index, Sampling(temperature=1) if not options else Sampling(**options))) == 1


def test_a_logit_bias_bans_and_forces(context, index):
    best, second = np.argsort(-context.logits(index))[:2].tolist()
    for ban in (-100.0, -math.inf):
        assert draws(context, index, Sampling(temperature=0, logit_bias=((best, ban),)), n=1) == {second}
    assert draws(context, index, Sampling(temperature=0, logit_bias=((5, 1000.0),)), n=1) == {5}


@pytest.mark.parametrize("temperature", [0, 1])
def test_biases_of_one_token_add_up_and_leave_the_logits_alone(context, index, temperature):
    before = context.logits(index).copy()
    best, second = np.argsort(-before)[:2].tolist()
    forced = ((second, 1000.0), (best, 2000.0), (best, -math.inf))
    assert draws(context, index, Sampling(temperature=temperature, logit_bias=forced), n=1) == {second}
    assert np.array_equal(context.logits(index), before)


def test_a_bias_beyond_the_vocabulary_is_refused(context):
    with pytest.raises(InvalidRequest) as caught:
        Sampler(context, Sampling(logit_bias=((10**6, 1.0),)), prompt=(1,))
    assert caught.value.field == "logit_bias"


@pytest.mark.parametrize(
    "options", [{"repeat_penalty": 100.0}, {"presence_penalty": 100.0}, {"frequency_penalty": 100.0}]
)
def test_penalties_look_back_on_the_prompt(context, index, options):
    best = int(context.logits(index).argmax())
    greedy = Sampling(temperature=0, **options)
    assert best not in draws(context, index, greedy, n=1, prompt=(3, best, 4))
    assert best in draws(context, index, greedy, n=1, prompt=(3, 4))


def test_penalties_look_back_no_further_than_asked(context, index):
    best = int(context.logits(index).argmax())
    greedy = Sampling(temperature=0, presence_penalty=100.0, repeat_last_n=2)
    assert best in draws(context, index, greedy, n=1, prompt=(best, 3, 4))


def test_dry_breaks_a_repetition_begun_in_the_prompt(context, index):
    best = int(context.logits(index).argmax())
    greedy = Sampling(temperature=0, dry_multiplier=100.0)
    repeated = (600, 601, 602, best, 700, 600, 601, 602)
    assert best not in draws(context, index, greedy, n=1, prompt=repeated)
    assert best in draws(context, index, greedy, n=1, prompt=(600, 601, 602, 700))


def test_logprobs_are_in_order_and_sum_to_one(context, index, model):
    detail = logprobs(context, index, 7, n_top=20)
    values = [value for _, _, value in detail.top]
    assert values == sorted(values, reverse=True)
    whole = logprobs(context, index, 7, n_top=model.n_vocab)
    assert sum(math.exp(value) for _, _, value in whole.top) == pytest.approx(1, abs=1e-6)
    assert detail.logprob == pytest.approx({t: v for t, _, v in whole.top}[7])
    assert all(text == model.piece(token, special=True) for token, text, _ in detail.top)


@pytest.mark.parametrize("wanted", [None, 0, 3])
def test_a_request_gets_the_logprobs_it_asks_for(write, wanted):
    answer = write(temperature=0, wanted=wanted, max_tokens=4)
    if wanted is None:
        assert answer.logprobs == []
        return
    assert [detail.token for detail in answer.logprobs] == answer.tokens
    assert all(len(detail.top) == wanted for detail in answer.logprobs)
    if wanted:
        assert all(detail.top[0][0] == detail.token for detail in answer.logprobs), "greedy takes the best"


def test_a_grammar_shapes_the_text(write):
    answer = write(temperature=1.0, seed=1, grammar='root ::= "yes" | "no"')
    assert answer.text in ("yes", "no")
    assert answer.done.finish_reason == "stop"


def test_a_grammar_holds_multi_byte_characters(write):
    assert write(temperature=0, grammar='root ::= "한국🙂"', max_tokens=20).text == "한국🙂"


def test_a_grammar_that_nothing_can_continue_fails_the_request_alone(context, index):
    sampling = Sampling(temperature=0, grammar='root ::= "\\x00"')
    sampler = Sampler(context, sampling, prompt=(1,))
    with pytest.raises(NoTokenAllowed):
        sampler.sample(index)
    sampler.close()


LEFT_RECURSIVE = ("root ::= a\na ::= b\nb ::= a", 'root ::= [x]? root "a" | "b"')


def test_a_grammar_that_does_not_parse_is_refused(context):
    for grammar in ("root ::= undefined", "start ::= 'x'", 'root ::= "a', "root ::= root", *LEFT_RECURSIVE):
        with pytest.raises(InvalidRequest) as caught:
            Sampler(context, Sampling(grammar=grammar), prompt=(1,))
        assert caught.value.field == "grammar"
