"""What full-text search reads of a text, and the query it is asked."""

import importlib.util

import pytest

from rag import lexical

MODES = [
    pytest.param(
        "kiwi",
        marks=pytest.mark.skipif(not importlib.util.find_spec("kiwipiepy"), reason="kiwipiepy is an extra"),
    ),
    "pairs",
]


@pytest.mark.parametrize("mode", MODES)
def test_a_noun_is_found_with_any_particle_attached(mode):
    written = set(lexical.words("육아휴직은 최대 열두 달입니다. 휴가를 신청하세요.", mode).split())
    asked = {
        term.strip('"') for term in (lexical.match("육아휴직을 며칠 쓸 수 있나요?", mode) or "").split(" OR ")
    }
    assert {"육아", "휴직"} <= written & asked


@pytest.mark.parametrize("mode", MODES)
def test_text_without_hangul_or_han_is_left_alone(mode):
    assert lexical.words("Plain text, 3.5 kg, naïve_name()", mode) == "Plain text, 3.5 kg, naïve_name()"


@pytest.mark.parametrize("mode", MODES)
def test_latin_words_and_numbers_beside_hangul_stay(mode):
    kept = lexical.words("보증 기간은 ACME-7 모델이 30개월", mode)
    assert all(word in kept for word in ("ACME", "7", "30"))


def test_han_and_kana_become_pairs():
    assert lexical.words("東京都", "pairs").split() == ["東京", "京都"]


def test_every_word_of_a_question_is_quoted_once():
    assert lexical.match('a "b" OR a* NEAR(c', "pairs") == '"a" OR "b" OR "or" OR "near" OR "c"'
    assert lexical.match("?! --", "pairs") is None


def test_the_share_of_hangul_counts_letters_only():
    assert lexical.hangul_share("휴가 2024!") == 1
    assert lexical.hangul_share("ab 휴가") == 0.5
    assert lexical.hangul_share("123") == 0
