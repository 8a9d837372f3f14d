"""The scenarios by name: their clients, the servers' shape, what is shown of them, and what lq aims at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from benchmarks.serving import figures, neighbours, promises, scenarios
from benchmarks.serving.plan import Client
from benchmarks.serving.texts import Texts


@dataclass(frozen=True, slots=True)
class Shape:
    """How both servers are started. `n_ctx` counts tokens of one request; `slots`: None leaves it to --slots;
    `kv_cells`: KV cells of all requests together, unified; None gives each slot n_ctx of its own."""

    n_ctx: int
    slots: int | None = None
    kv_cells: int | None = None


@dataclass(frozen=True, slots=True)
class Goal:
    """What lq aims at in one figure: of the ratio to the other server, or of lq's own value. `models`: a part
    of the names of the files that it is meant for; "" all. Of two in one figure the first is judged."""

    figure: str
    at_least: float | None = None
    at_most: float | None = None
    own: bool = False
    models: str = ""

    def is_of(self, model: str) -> bool:
        """Whether it is meant for a file of this name."""
        return self.models.lower() in model.lower()

    def met(self, value: float) -> bool:
        """Whether a ratio (or lq's own value) reaches it."""
        low = self.at_least is None or value >= self.at_least
        return low and (self.at_most is None or value <= self.at_most)

    def __str__(self) -> str:
        sign, bound = ("≥", self.at_least) if self.at_least is not None else ("≤", self.at_most)
        unit = figures.FIGURES[self.figure].unit if self.own else "×"
        return f"{sign} {bound:.3g} {unit}".rstrip() if self.own else f"{sign} {bound:.3g}{unit}"


@dataclass(frozen=True, slots=True)
class Scenario:
    """One load. `quick`: arguments of `build` for --quick. `rival`: options of a second lq that it is
    compared with, in place of llama-server. `leavers`: the group whose slots are watched for being freed.
    `without`: a group; each round is played once more without it, with the `same_texts` where only what is
    written counts and not how soon, since they are cached then. `keys`: weights of API keys, one for each
    group of that name. `rounds`: at most so many. `asks_alone`: after the first round of lq its requests are
    asked one by one. `watches_memory`: of both servers."""

    title: str
    build: Callable[..., Sequence[Client]]
    shape: Shape
    shows: tuple[str, ...]
    goals: tuple[Goal, ...] = ()
    evaluate: figures.Evaluate = figures.everyday
    quick: Mapping[str, Any] = field(default_factory=dict)
    rival: tuple[str, ...] | None = None
    leavers: str | None = None
    without: str | None = None
    same_texts: bool = False
    keys: Mapping[str, float] = field(default_factory=dict)
    rounds: int | None = None
    asks_alone: bool = False
    watches_memory: bool = False

    def clients(self, texts: Texts, seed: str, *, quick: bool) -> Sequence[Client]:
        """The plan of one round; the same seed gives the same plan."""
        return self.build(texts, Random(seed), **(self.quick if quick else {}))


SPECULATION_OFF = ("--speculation", "off")
WEIGHTS = {"heavy": 3.0, "light": 1.0}

SPEEDS = ("stream_tokens_per_s", "tokens_per_s", "others_tokens_per_s")
LATENCIES = ("long_ttft_s", "single_ttft_s")

WAITS = ("tokens_per_s", "ttft_p50_s", "ttft_p95_s", "gap_s", "failed")
SHARED = ("tokens_per_s", "ttft_p50_s", "ttft_p95_s", "gap_s", "cached_share", "failed")
BESIDE = ("long_ttft_s", "gap_s", "failed")

#: Requests of at most 2,048 tokens in eight slots make the 16,384 cells that the other figures of this
#: repository were measured with.
CHAT = Shape(n_ctx=2048)


def never_slower(shown: Sequence[str]) -> list[Goal]:
    """What lq aims at beside lq without speculation, in the first figure of speed that a scenario shows."""
    goals = [Goal(figure, at_least=0.98) for figure in SPEEDS if figure in shown]
    goals += [Goal(figure, at_most=1 / 0.98) for figure in LATENCIES if figure in shown]
    return goals[:1]


def _chats(clients: int, ratio: float, *, slots: int | None = None) -> Scenario:
    """As many slots as clients where there are more than --slots usually gives: what waits in a queue says
    nothing of how many a server can decode together."""
    return Scenario(
        title=f"{clients} client{'s' * (clients > 1)}, short prompts, 64 tokens out",
        build=partial(scenarios.chats, clients=clients),
        shape=Shape(n_ctx=CHAT.n_ctx, slots=slots),
        shows=WAITS,
        goals=(Goal("tokens_per_s", at_least=ratio),),
        quick={"max_tokens": 32},
    )


def _long(size: int, n_ctx: int, answer: int) -> Scenario:
    return Scenario(
        title=f"a {size:,}-token prompt beside 4 streams",
        build=partial(scenarios.long_prompt, size=size, answer=answer),
        shape=Shape(n_ctx=n_ctx),
        shows=BESIDE,
        goals=(Goal("gap_s", at_most=0.3, own=True), Goal("long_ttft_s", at_most=1.5)),
        evaluate=neighbours.beside_long,
    )


SCENARIOS = {
    "clients-1": _chats(1, 1.0),
    "clients-4": _chats(4, 1.05),
    "clients-8": _chats(8, 1.05),
    "clients-32": _chats(32, 1.1, slots=32),
    "shared-prefix": Scenario(
        title="16 clients share 1,500 tokens, 60 own, 32 out, two requests each, cold",
        build=scenarios.shared_prefix,
        shape=CHAT,
        shows=SHARED,
        goals=(Goal("tokens_per_s", at_least=2.5), Goal("ttft_p95_s", at_most=1 / 3)),
        quick={"clients": 8},
    ),
    "multi-turn": Scenario(
        title="8 chats of 6 turns, answers in the history",
        build=scenarios.multi_turn,
        shape=CHAT,
        shows=("later_ttft_p50_s", *SHARED),
        goals=(Goal("later_ttft_p50_s", at_most=1.0),),
        evaluate=figures.conversations,
        quick={"clients": 4, "turns": 4},
    ),
    "rag": Scenario(
        title="ten contexts of 1,500 tokens, each asked about by 4 clients",
        build=scenarios.rag,
        shape=CHAT,
        shows=SHARED,
        goals=(Goal("tokens_per_s", at_least=1.3),),
        quick={"contexts": 4},
    ),
    "long-1200": _long(1200, n_ctx=4096, answer=3000),
    "long-6000": _long(6000, n_ctx=8192, answer=7000),
    "oversubscribed": Scenario(
        title="32 clients whose sum is three times the 8,192 KV cells",
        build=scenarios.oversubscribed,
        shape=Shape(n_ctx=8192, slots=32, kv_cells=8192),
        shows=(
            "failed",
            "requests",
            "differing",
            "unexcused",
            "parting_gap",
            "unlike_again",
            "tokens_per_s",
            "ttft_p50_s",
            "ttft_p95_s",
            "gap_s",
        ),
        goals=(Goal("failed", at_most=0, own=True), Goal("unexcused", at_most=0, own=True)),
        evaluate=promises.as_alone,
        asks_alone=True,
    ),
    "abandoned": Scenario(
        title="16 clients, every second hangs up",
        build=scenarios.abandoned,
        shape=Shape(n_ctx=CHAT.n_ctx, slots=16),
        shows=(
            "others_tokens_per_s",
            "unchanged",
            "freed_steps",
            "freed_s",
            "step_s",
            "ttft_p95_s",
            "gap_s",
            "failed",
        ),
        goals=(
            Goal("others_tokens_per_s", at_least=1.0),
            Goal("unchanged", at_least=0.95, own=True),
            Goal("freed_steps", at_most=1, own=True),
        ),
        evaluate=neighbours.those_who_stay,
        leavers="leave",
        without="leave",
        same_texts=True,
    ),
    "grounded": Scenario(
        title="answers that quote passages; without --peer, speculation on against off",
        build=scenarios.grounded,
        shape=CHAT,
        shows=("stream_tokens_per_s", *WAITS),
        goals=(
            Goal("stream_tokens_per_s", at_least=1.2, models="1.5b"),  # smaller ones rarely quote
            Goal("stream_tokens_per_s", at_least=0.98),
        ),
        quick={"questions": 3},
        rival=SPECULATION_OFF,
    ),
    "memory": Scenario(
        title="2,000 short requests of 8 clients",
        build=scenarios.many_short,
        shape=CHAT,
        shows=(
            "peak_mb",
            "beyond_budget_mb",
            "growth_mb",
            "cache_growth_mb",
            "leak_mb",
            "requests",
            "failed",
        ),
        goals=(Goal("beyond_budget_mb", at_most=400, own=True), Goal("leak_mb", at_most=10, own=True)),
        evaluate=promises.memory,
        quick={"requests": 400},
        rounds=1,
        watches_memory=True,
    ),
    "weights": Scenario(
        title="two keys of weights 3 and 1, 12 clients each, all always asking",
        build=partial(scenarios.weighted, keys=tuple(WEIGHTS)),
        shape=CHAT,
        shows=("tokens_ratio", "off_weights", "tokens_per_s", "failed"),
        goals=(Goal("off_weights", at_most=10, own=True),),
        evaluate=partial(neighbours.by_weight, weights=WEIGHTS),
        quick={"turns": 4},
        keys=WEIGHTS,
    ),
    "flood": Scenario(
        title="one key asks 32 times at once beside another's single requests",
        build=scenarios.flooded,
        shape=CHAT,
        shows=("ttft_of_alone", "single_ttft_s", "alone_ttft_s", "failed"),
        goals=(Goal("ttft_of_alone", at_most=1.5, own=True),),
        evaluate=neighbours.beside_flood,
        quick={"singles": 10},
        without="flood",
        keys={"flood": 1.0, "single": 1.0},
    ),
}
