"""Guesses from what was written before."""

from engine.lookup import N_GRAM, Lookup


def test_what_followed_last_time_is_guessed():
    tokens = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    assert Lookup().guess(tokens, 3) == [4, 5, 6]


def test_the_latest_of_several_places_counts():
    assert Lookup().guess([1, 2, 3, 4, 0, 1, 2, 3, 5, 0, 1, 2, 3], 1) == [5]


def test_a_new_end_and_short_texts_give_nothing():
    assert Lookup().guess([1, 2, 3, 4], 4) == []
    for length in range(N_GRAM + 1):
        assert Lookup().guess([7] * length, 4) == []


def test_it_reads_only_what_is_new_and_finds_as_much():
    tokens = [i % 5 for i in range(40)] + [7, 7, 1, 2, 3, 9, 1, 2, 3]
    growing = Lookup()
    for end in range(len(tokens) + 1):
        assert growing.guess(tokens[:end], 5) == Lookup().guess(tokens[:end], 5)


def test_guesses_end_where_the_text_ends():
    assert Lookup().guess([5, 5, 5, 5], 8) == [5]
