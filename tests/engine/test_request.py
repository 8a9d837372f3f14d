"""Every field of a request and of the configuration is checked, and the error names it."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from engine.request import (
    MAX_LOGIT_BIASES,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    ContextOverflow,
    EngineConfig,
    GenerationRequest,
    InvalidRequest,
    QueueFull,
    Sampling,
)

NAN, INFINITY = math.nan, math.inf
NUMBERS = {
    "temperature": (-0.1, 101),
    "top_p": (-0.1, 1.1),
    "min_p": (-0.1, 1.1),
    "typical_p": (-0.1, 1.1),
    "repeat_penalty": (0, 101),
    "presence_penalty": (-101, 101),
    "frequency_penalty": (-101, 101),
    "dry_multiplier": (-1, 101),
    "dry_base": (0.5, 101),
}
WHOLE_NUMBERS = {
    "top_k": (-1, 2**31),
    "repeat_last_n": (-1, 2**21),
    "dry_allowed_length": (0, 2**21),
    "dry_penalty_last_n": (-1, 2**21),
    "seed": (-(2**63) - 1, 2**63),
}


def refused(request: GenerationRequest | Sampling | EngineConfig) -> str:
    with pytest.raises(InvalidRequest) as caught:
        request.validate()
    return caught.value.field


def test_the_defaults_are_valid():
    GenerationRequest("hello").validate()
    EngineConfig(Path("model.gguf")).validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field, bounds in (NUMBERS | WHOLE_NUMBERS).items()
        for value in (*bounds, NAN, INFINITY, -INFINITY, "1", [1], True)
    ]
    + [(field, 1.5) for field in WHOLE_NUMBERS],
)
def test_a_sampling_field_out_of_range_or_of_the_wrong_type_is_named(field, value):
    assert refused(Sampling(**{field: value})) == field


@pytest.mark.parametrize(
    "biases",
    [
        ((-1, 0.0),),
        ((2**31, 0.0),),
        ((1.5, 0.0),),
        (("1", 0.0),),
        ((True, 0.0),),
        ((1, NAN),),
        ((1, INFINITY),),
        ((1, "5"),),
        tuple((token, 0.0) for token in range(MAX_LOGIT_BIASES + 1)),
    ],
)
def test_bad_logit_biases_are_refused(biases):
    assert refused(Sampling(logit_bias=biases)) == "logit_bias"


def test_a_bias_may_ban_with_minus_infinity():
    Sampling(logit_bias=((1, -INFINITY), (2, -100.0), (3, 5))).validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", ()),
        ("prompt", "lone \ud800 surrogate"),
        ("prompt", b"bytes"),
        ("prompt", None),
        ("prompt", (1, "2")),
        ("prompt", (1, 2.5)),
        ("prompt", (1, -2)),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("logprobs", -1),
        ("logprobs", 21),
        ("logprobs", 1.5),
        ("logprobs", True),
        ("stop", ("",)),
        ("stop", "text"),
        ("stop", (1,)),
        ("stop", ("x" * (MAX_STOP_CHARACTERS + 1),)),
        ("stop", ("x",) * (MAX_STOP_STRINGS + 1)),
        ("ignore_eos", "yes"),
        ("add_special", 1),
        ("parse_special", None),
    ],
)
def test_a_request_field_out_of_range_or_of_the_wrong_type_is_named(field, value):
    assert refused(replace(GenerationRequest("hello"), **{field: value})) == field


def test_a_grammar_and_ignore_eos_exclude_each_other():
    request = GenerationRequest("a", sampling=Sampling(grammar='root ::= "a"'), ignore_eos=True)
    assert refused(request) == "ignore_eos"


@pytest.mark.parametrize("grammar", [7, b'root ::= "a"', 'root ::= "\ud800"'])
def test_a_grammar_that_is_no_text_is_refused(grammar):
    assert refused(Sampling(grammar=grammar)) == "grammar"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_ctx", 15),
        ("n_ctx", 2**25),
        ("n_ctx", 512.5),
        ("n_ctx", NAN),
        ("n_parallel", 0),
        ("n_parallel", 257),
        ("n_threads", 0),
        ("n_gpu_layers", -1),
        ("n_batch", 0),
        ("max_queue", -1),
        ("kv_type_k", "q3_k"),
        ("kv_type_v", ""),
    ],
)
def test_a_bad_configuration_names_the_field(field, value):
    assert refused(replace(EngineConfig(Path("model.gguf")), **{field: value})) == field


def test_a_bad_adapter_scale_names_the_adapter():
    config = EngineConfig(Path("model.gguf"), lora=((Path("tone.gguf"), NAN),))
    assert "tone.gguf" in refused(config)


def test_messages_carry_the_numbers():
    overflow = ContextOverflow(5000, 4096)
    assert (overflow.n_prompt_tokens, overflow.n_ctx) == (5000, 4096)
    assert "5000" in str(overflow)
    assert "4096" in str(overflow)
    assert "at least" not in str(overflow)
    assert "has at least 5000 tokens" in str(ContextOverflow(5000, 4096, at_least=True))
    assert QueueFull(256, retry_after_s=3.0).retry_after_s == 3.0
