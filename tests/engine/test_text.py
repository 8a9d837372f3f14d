"""Text out of token bytes: whole characters, and nothing of a stop string."""

import random

import pytest

from engine.text import Decoder, StopStrings


def shown(strings: tuple[str, ...], pieces: list[str]) -> tuple[list[str], StopStrings]:
    """What each piece made visible, the held-back rest last."""
    stops = StopStrings(strings)
    texts = [stops.step(piece) for piece in pieces]
    return [*texts, stops.flush()], stops


@pytest.mark.parametrize("text", ["한국어 문장", "🙂👩‍👩‍👧", "naïve ©", "plain"])
def test_characters_split_over_tokens_come_whole(text):
    decoder = Decoder()
    pieces = [decoder.step(bytes([byte])) for byte in text.encode()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


def test_half_a_character_waits_for_its_other_half():
    decoder = Decoder()
    data = "é".encode()
    assert decoder.step(data[:1]) == ""
    assert decoder.step(data[1:]) == "é"


def test_bytes_that_are_no_text_become_replacement_characters():
    decoder = Decoder()
    assert decoder.step(b"a\xff") + decoder.step(b"b") == "a\ufffdb"


def test_without_stop_strings_text_passes_at_once():
    assert shown((), ["ab", "", "c"])[0] == ["ab", "", "c", ""]


def test_stop_string_split_over_two_tokens_never_leaks():
    texts, stops = shown(("<end>",), ["hello <e", "nd> more"])
    assert texts == ["hello ", "", ""]
    assert stops.found == "<end>"


def test_stop_string_over_one_character_tokens_never_leaks():
    texts, stops = shown(("STOP",), list("go STOP on"))
    assert "".join(texts) == "go "
    assert stops.found == "STOP"


def test_the_start_of_a_stop_string_that_does_not_come_true_is_shown():
    texts, stops = shown(("<end>",), ["a <e", "gg", " <en"])
    assert texts == ["a ", "<egg", " ", "<en"]
    assert stops.found is None


def test_the_earliest_of_two_stop_strings_ends_the_text():
    texts, stops = shown(("later", "soon"), ["very soon or later"])
    assert texts == ["very ", ""]
    assert stops.found == "soon"


def test_of_two_stop_strings_at_one_place_the_longer_is_named():
    _, stops = shown(("ab", "abc"), ["xabc"])
    assert stops.found == "abc"


def test_overlapping_stop_strings_hold_back_the_longest_possible_start():
    texts, stops = shown(("aab", "abc"), ["aa", "a", "bc"])
    assert "".join(texts) == "a"
    assert stops.found == "aab"


def test_a_stop_string_that_overlaps_itself_is_found():
    texts, stops = shown(("aaab",), ["a"] * 5 + ["b"])
    assert "".join(texts) == "aa"
    assert stops.found == "aaab"


def test_nothing_comes_after_the_stop_string():
    stops = StopStrings(("x",))
    assert stops.step("ax") == "a"
    assert stops.step("more") == ""
    assert stops.flush() == ""


def test_any_split_of_any_text_shows_what_the_whole_text_would():
    chance = random.Random(2)
    for _ in range(3000):
        text = "".join(chance.choice("ab") for _ in range(chance.randrange(14)))
        strings = tuple({"".join(chance.choice("ab") for _ in range(chance.randint(1, 4))) for _ in range(2)})
        pieces, rest = [], text
        while rest:
            cut = chance.randint(1, len(rest))
            pieces.append(rest[:cut])
            rest = rest[cut:]
        texts, stops = shown(strings, pieces)
        ends = [text.find(string) + len(string) for string in strings if string in text]
        visible = "".join(texts)
        assert all(string not in visible for string in strings)
        if not ends:
            assert (visible, stops.found) == (text, None)
        else:
            assert text.startswith(visible)
            assert text[len(visible) :].startswith(stops.found)
