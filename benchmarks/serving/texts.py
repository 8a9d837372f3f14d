"""Prompts of a stated number of tokens: made-up records, drawn from a pool that was sized once.

Sentences are sized with the tokenizer of the model under test, so that "1,500 tokens" holds for every model;
a text's size is then the sum of its sentences', which is true to a token or two since no tokenizer here
merges over the end of a sentence. Everything follows from the seed of the `Random` that is passed in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

POOL = 400
NUMBER = 12  # tokens of `fresh`'s beginning where each digit is one, as in most vocabularies
PEOPLE = (
    "The harbour master", "A young surveyor", "The village doctor", "An old weaver", "The night watchman",
    "A travelling printer", "The school teacher", "The lighthouse keeper",
)  # fmt: skip
DEEDS = ("counted", "sold", "repaired", "described", "borrowed", "painted", "measured", "lost")
THINGS = (
    "barrels of oil", "wooden boats", "silver coins", "maps of the coast", "sacks of wheat", "brass lamps",
    "letters", "rolls of cloth",
)  # fmt: skip
PLACES = ("Lindale", "Marwick", "Osthaven", "Pellbridge", "Quarrington", "Redmoor", "Stavely", "Thornby")
ENDS = (
    "", " before the winter storms came", " and wrote it down in a green book",
    ", although nobody had asked", " while the whole town was asleep",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Texts:
    """A pool of (sentence, tokens) with the sizes that one tokenizer gives."""

    pool: tuple[tuple[str, int], ...]

    @classmethod
    def sized(cls, count_tokens: Callable[[str], int]) -> "Texts":
        """The pool for one tokenizer; about 400 calls of `count_tokens`."""
        rng = Random("pool")
        written = dict.fromkeys(sentence(rng) for _ in range(POOL))
        return cls(tuple((text, count_tokens(f" {text}")) for text in written))

    def take(self, rng: Random, tokens: int) -> str:
        """Sentences of `tokens` tokens together; exact unless no sentence has the last size."""
        sizes = [size for _, size in self.pool]
        least, most = min(sizes), max(sizes)
        chosen: list[str] = []
        left = tokens
        while left > most:  # only what leaves room for one more sentence
            fitting = (
                self.pool if left > 2 * most else [each for each in self.pool if each[1] <= left - least]
            )
            if not fitting:
                break
            text, size = rng.choice(fitting)
            chosen.append(text)
            left -= size
        closest = min(abs(size - left) for size in sizes)
        last, _ = rng.choice([each for each in self.pool if abs(each[1] - left) == closest])
        return " ".join([*chosen, last])

    def fresh(self, rng: Random, tokens: int) -> str:
        """The same behind a number of its own: nothing cached of an earlier round is a prefix of it."""
        return f"Record {rng.randrange(10**8):08d}. {self.take(rng, tokens - NUMBER)}"


def sentence(rng: Random) -> str:
    """One record, such as "In 1874 an old weaver in Lindale sold 31 brass lamps."""
    who = rng.choice(PEOPLE)
    when = f"In {rng.randrange(1700, 1900)} {who[0].lower()}{who[1:]}"
    what = f"{rng.choice(DEEDS)} {rng.randrange(2, 999)} {rng.choice(THINGS)}"
    return f"{when} in {rng.choice(PLACES)} {what}{rng.choice(ENDS)}."
