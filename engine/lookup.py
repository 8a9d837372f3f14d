"""Guess the next tokens from the request's own: what followed the last time that these tokens were written.

Answers that quote their sources, and edits of a text that is in the prompt, are mostly copies. The guesses
cost nothing to make; the model checks them all in one call. Pure.
"""

N_GRAM = 3  # tokens that must be the same; shorter ones recur by chance


class Lookup:
    """Where each n-gram of one sequence was seen last."""

    def __init__(self) -> None:
        self._n_seen = 0
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> position behind its latest occurrence

    def guess(self, tokens: list[int], limit: int) -> list[int]:
        """What may come behind `tokens`, which only ever grow; nothing if their end is new."""
        self._read(tokens)
        at = self._next.get(tuple(tokens[-N_GRAM:]))
        return [] if at is None else tokens[at : at + limit]

    def _read(self, tokens: list[int]) -> None:
        """Note every n-gram that is not the end itself."""
        first = max(self._n_seen, N_GRAM)
        for end in range(first, len(tokens)):
            self._next[tuple(tokens[end - N_GRAM : end])] = end
        self._n_seen = max(first, len(tokens))
