"""Whatever calls cost and whatever comes true, a life with guesses takes no longer than one without."""

import random
from dataclasses import dataclass
from statistics import fmean

import pytest

from engine.luck import GUESSES_A_SEQUENCE, Luck
from engine.pace import Pace

ROOM = 16  # guesses of all in one call


@dataclass
class World:
    """What is true and nobody is told: seconds of calls, and which guesses come true."""

    chance: random.Random
    by_itself_s: float  # of a call
    token_s: float
    dearer: float  # how much longer a guess takes than another token
    in_streams: bool
    noise: float
    right: float  # the share of guesses that come true, on average
    quoting: float  # how often a sequence has any

    @classmethod
    def of(cls, seed: int) -> "World":
        chance = random.Random(seed)
        return cls(
            chance,
            by_itself_s=chance.choice([0.002, 0.010, 0.040]),
            token_s=chance.choice([0.0001, 0.001, 0.004, 0.010]),
            dearer=chance.choice([0.5, 1.0, 2.0, 4.0]),
            in_streams=chance.random() < 0.6,
            noise=chance.choice([0.0, 0.05, 0.2]),
            right=chance.choice([0.0, 0.1, 0.3, 0.5, 0.7, 0.95]),
            quoting=chance.choice([0.05, 0.3, 1.0]),
        )

    def plain_s(self, n_writing: int) -> float:
        return self.by_itself_s + n_writing * self.token_s

    def call_s(self, tokens: list[int]) -> float:
        """As llama.cpp cuts a call into calls of sequences that are neighbours, as many tokens of each."""
        n_guesses = sum(tokens) - len(tokens)
        n_calls = len(_parts(tokens)) if self.in_streams else 1
        seconds = n_calls * self.by_itself_s + (sum(tokens) + (self.dearer - 1) * n_guesses) * self.token_s
        return seconds

    def n_right(self, right: float, n_guesses: int) -> int:
        for at in range(n_guesses):
            if self.chance.random() >= right:
                return at
        return n_guesses


def _parts(tokens: list[int]) -> list[int]:
    """Tokens of each of the calls."""
    if not tokens:
        return []
    least, parts, run = min(tokens), [min(tokens) * len(tokens)], []
    for left in [*(each - least for each in tokens), 0]:
        if left:
            run.append(left)
        elif run:
            parts += _parts(run)
            run = []
    return parts


def life(world: World, n_clients: int, n_tokens: int, n_rounds: int) -> tuple[float, float]:
    """Seconds with and without guesses of clients that each ask for so many answers, one after another."""
    pace = Pace(in_streams=world.in_streams)
    for count in (1, 4, 8):
        pace.learn(n_writing=count, n_prompt=0, seconds=world.plain_s(count))
    luck = Luck(pace)
    with_s = without_s = 0.0
    for turn in range(n_rounds):
        lengths = [max(1, int(world.chance.gauss(n_tokens, n_tokens / 4))) for _ in range(n_clients)]
        for step in range(max(lengths)):
            without_s += world.plain_s(sum(length > step for length in lengths))
        left = {(turn, client): length for client, length in enumerate(lengths)}
        right = {key: min(1.0, world.right * world.chance.choice([0.5, 1, 1.5])) for key in left}
        while left:
            with_s += _step(world, pace, luck, left, right)
    return with_s, without_s


def _step(world: World, pace: Pace, luck: Luck, left: dict, right: dict) -> float:
    found = {
        key: min(GUESSES_A_SEQUENCE, n - 1)
        for key, n in left.items()
        if n > 1 and world.chance.random() < world.quoting
    }
    counts = luck.worthwhile(found, len(left), most=ROOM)
    assert sum(counts.values()) <= ROOM
    n_writing, tokens = len(left), [1 + counts.get(key, 0) for key in left]
    seconds = world.call_s(tokens)
    measured_s = seconds * max(0.5, world.chance.gauss(1, world.noise))
    n_guesses, even = sum(counts.values()), len(set(tokens)) == 1
    pace.learn(n_writing=n_writing, n_prompt=0, seconds=measured_s, n_guesses=n_guesses, even=even)
    ahead = []
    for key in list(left):
        n_right = world.n_right(right[key], counts.get(key, 0))
        if key in counts:
            ahead.append(n_right)
            luck.learn(key, n_guesses=counts[key], n_right=n_right)
        left[key] -= 1 + n_right
        if left[key] <= 0:
            del left[key]
            luck.forget(key)
    if counts:
        luck.made(n_writing, n_guesses=n_guesses, ahead=ahead, seconds=measured_s)
    else:
        luck.without(n_writing, measured_s)
    return seconds


@pytest.mark.parametrize("n_clients", [1, 4, 8, 32])
def test_guesses_are_never_a_loss(n_clients):
    shares = []
    for seed in range(60):
        world = World.of(seed)
        with_s, without_s = life(world, n_clients, n_tokens=64, n_rounds=5)
        assert with_s <= 1.02 * without_s, (seed, with_s / without_s)
        shares.append(with_s / without_s)
    assert fmean(shares) <= 1.002
