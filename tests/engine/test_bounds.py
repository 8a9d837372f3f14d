"""Long texts: refused before they are read, and with numbers that are true."""

import pytest

from engine.bounds import (
    CHARACTERS_PER_TOKEN,
    COUNTED,
    LIKELY_CHARACTERS,
    NEAR_A_CUT,
    is_too_long,
    tokens_within,
)
from engine.request import ContextOverflow

N_CTX = 100


class Words:
    """A tokenizer that notes how much it read: a token for every word."""

    def __init__(self) -> None:
        self.n_read = 0

    def __call__(self, text: str) -> list[int]:
        self.n_read += len(text)
        return list(range(len(text.split())))


def test_a_text_that_fits_is_read_once():
    words = Words()
    assert len(tokens_within(words, "a " * 99, N_CTX)) == 99
    assert words.n_read == 198


def test_a_text_that_is_a_little_too_long_is_told_exactly():
    with pytest.raises(ContextOverflow, match="has 100 tokens but the context holds 100"):
        tokens_within(Words(), "a " * 100, N_CTX)


def test_of_ten_megabytes_only_the_beginning_is_read():
    words = Words()
    with pytest.raises(ContextOverflow, match="at least 163840 tokens") as caught:
        tokens_within(words, "a " * (5 << 20), N_CTX)
    assert words.n_read == COUNTED
    assert (caught.value.n_prompt_tokens, caught.value.n_ctx, caught.value.at_least) == (163840, 100, True)


def test_what_is_said_to_be_there_at_least_is_there():
    words, n_ctx = Words(), 100_000
    with pytest.raises(ContextOverflow) as caught:
        tokens_within(words, "a " * 1_000_000, n_ctx)
    assert caught.value.at_least
    assert words.n_read == LIKELY_CHARACTERS * n_ctx
    assert caught.value.n_prompt_tokens == LIKELY_CHARACTERS * n_ctx // 2 - NEAR_A_CUT


def test_what_is_soon_counted_is_told_exactly_however_small_the_context_is():
    with pytest.raises(ContextOverflow, match="has 5000 tokens but the context holds 100"):
        tokens_within(Words(), "word " * 5000, N_CTX)


def test_long_words_are_read_to_their_end():
    word = "a" * 60 + " "
    assert len(tokens_within(Words(), word * 99, N_CTX)) == 99
    with pytest.raises(ContextOverflow, match="has 103 tokens"):
        tokens_within(Words(), word * 103, N_CTX)


def test_no_token_has_more_characters_than_is_thought():
    assert not is_too_long(CHARACTERS_PER_TOKEN * N_CTX, N_CTX)
    assert is_too_long(CHARACTERS_PER_TOKEN * N_CTX + 1, N_CTX)
    n_ctx = 2 * COUNTED
    with pytest.raises(ContextOverflow, match=f"at least {n_ctx + 1} tokens"):
        tokens_within(Words(), "a" * CHARACTERS_PER_TOKEN * (n_ctx + 1), n_ctx)
