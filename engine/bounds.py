"""Texts that cannot fit are refused before all their tokens are counted: of 10 MB that takes seconds.

Everybody who writes would wait for that, since there is one thread. Pure.
"""

from collections.abc import Callable

from engine.request import ContextOverflow

#: Characters for each token that is read, at most. Prose has 2 to 6, the longest words of a vocabulary
#: about 20.
CHARACTERS_PER_TOKEN = 64
LIKELY_CHARACTERS = 8  # for each token: what is longer is tokenised in part first
COUNTED = 100_000  # characters that are tokenised whatever the context is: they take some 50 ms
NEAR_A_CUT = 16  # tokens at the end of a part, which may be others in the whole


def is_too_long(n_characters: int, n_ctx: int) -> bool:
    """Whether so many characters are more than any text of `n_ctx` tokens has."""
    return n_characters > CHARACTERS_PER_TOKEN * n_ctx


def check_length(text: str, n_ctx: int) -> None:
    """Raise ContextOverflow for a text that cannot have fewer tokens than `n_ctx`."""
    if is_too_long(len(text), n_ctx):
        raise ContextOverflow(len(text) // CHARACTERS_PER_TOKEN, n_ctx, at_least=True)


def tokens_within(tokenize: Callable[[str], list[int]], text: str, n_ctx: int) -> list[int]:
    """The tokens of a text; ContextOverflow, maybe before all were counted, if they are `n_ctx` or more."""
    likely = max(COUNTED, LIKELY_CHARACTERS * n_ctx)
    if len(text) > likely:
        n_certain = len(tokenize(text[:likely])) - NEAR_A_CUT
        if n_certain >= n_ctx or is_too_long(len(text), n_ctx):
            n_least = max(n_certain, len(text) // CHARACTERS_PER_TOKEN)
            raise ContextOverflow(n_least, n_ctx, at_least=True)
    tokens = tokenize(text)
    if len(tokens) >= n_ctx:
        raise ContextOverflow(len(tokens), n_ctx)
    return tokens
