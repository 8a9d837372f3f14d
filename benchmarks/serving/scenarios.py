"""What clients do to a server: each scenario is a pure function from texts and a seed to a list of clients.

Both servers get the same list in a round, and every round another one: the text that requests share begins
with a number of the round's own (Texts.fresh), so that nothing cached of earlier rounds serves it and no
server has to be started again. Arrivals are spread and jittered by the same seed.
"""

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from benchmarks.serving.plan import Client, Message, Turn
from benchmarks.serving.texts import Texts

# Own tokens of a short prompt; with the template of the default model they are about seventy.
PROMPT = 40


def arrivals(rng: Random, n: int, spread_s: float) -> list[float]:
    """n moments over `spread_s`, one at random in each n-th of it."""
    return [spread_s * (k + rng.random()) / n for k in range(n)]


def user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def system(text: str) -> Message:
    """The message that stands before all others."""
    return {"role": "system", "content": text}


def short(texts: Texts, rng: Random, *, max_tokens: int, leave_after_chars: int | None = None) -> Turn:
    """A turn with a short prompt that shares nothing with any other."""
    message = user(texts.fresh(rng, PROMPT))
    return Turn((message,), max_tokens, leave_after_chars=leave_after_chars)


def chats(texts: Texts, rng: Random, *, clients: int, max_tokens: int = 64) -> list[Client]:
    """Short chats: the sum of what is written is the same up to 8 clients, so that one client's round is no
    shorter than eight's."""
    turns = max(2, 16 // clients)
    return [
        Client(start, tuple(short(texts, rng, max_tokens=max_tokens) for _ in range(turns)))
        for start in arrivals(rng, clients, 0.5)
    ]


def shared_prefix(texts: Texts, rng: Random, *, clients: int = 16, shared: int = 1500) -> list[Client]:
    """An assistant behind a long system prompt: all share it, cold, and each asks twice."""
    prompt = system(texts.fresh(rng, shared))
    return [
        Client(start, tuple(Turn((prompt, user(texts.take(rng, 60))), 32) for _ in range(2)))
        for start in arrivals(rng, clients, 1.0)
    ]


def multi_turn(texts: Texts, rng: Random, *, clients: int = 8, turns: int = 6) -> list[Client]:
    """Conversations: each answer goes into the history. EOS counts here, as in real chats, for what follows
    an ignored EOS is nothing that a history ever holds."""
    plans = []
    for start in arrivals(rng, clients, 1.0):
        opening = Turn((user(texts.fresh(rng, 60)),), 48, ignore_eos=False)
        later = [
            Turn((user(texts.take(rng, 60)),), 48, ignore_eos=False, pause_s=rng.uniform(0.2, 0.6))
            for _ in range(turns - 1)
        ]
        plans.append(Client(start, (opening, *later), history=True))
    return plans


def rag(texts: Texts, rng: Random, *, contexts: int = 10, askers: int = 4, size: int = 1500) -> list[Client]:
    """Questions over retrieved passages: each context is asked about by several clients, in mixed order."""
    prompts = [system(texts.fresh(rng, size)) for _ in range(contexts)]
    order = [prompt for prompt in prompts for _ in range(askers)]
    rng.shuffle(order)
    starts = arrivals(rng, len(order), 8.0)
    return [
        Client(start, (Turn((prompt, user(texts.take(rng, 30))), 32),))
        for start, prompt in zip(starts, order, strict=True)
    ]


def long_prompt(texts: Texts, rng: Random, *, size: int, streams: int = 4, answer: int) -> list[Client]:
    """A long prompt that arrives one second after the last of some streams has begun; they run until it has
    its answer, so that it never has the machine to itself. `answer`: their limit, which nobody should
    reach."""
    running = [
        Client(start, (short(texts, rng, max_tokens=answer),), group="streams", until="long")
        for start in arrivals(rng, streams, 0.3)
    ]
    late = Client(1.0, (Turn((user(texts.fresh(rng, size)),), 16),), group="long", after="streams")
    return [*running, late]


def oversubscribed(
    texts: Texts, rng: Random, *, clients: int = 32, kv_cells: int = 8192, answer: int = 128
) -> list[Client]:
    """Prompts and answers that together need three times the KV cache; any one of them fits easily."""
    prompt = 3 * kv_cells // clients - answer - 30
    return [
        Client(start, (Turn((user(texts.fresh(rng, prompt)),), answer),))
        for start in arrivals(rng, clients, 2.0)
    ]


def abandoned(texts: Texts, rng: Random, *, clients: int = 16, stay: int = 192) -> list[Client]:
    """Every second client hangs up after about twenty tokens of the four hundred that it asked for."""
    plans = []
    for number, start in enumerate(arrivals(rng, clients, 0.3)):
        if number % 2:
            turn = short(texts, rng, max_tokens=400, leave_after_chars=80)
            plans.append(Client(start, (turn,), group="leave"))
        else:
            plans.append(Client(start, (short(texts, rng, max_tokens=stay),), group="stay"))
    return plans


def weighted(
    texts: Texts, rng: Random, *, keys: Sequence[str], clients: int = 12, turns: int = 6
) -> list[Client]:
    """Keys that all want more than there is: as many clients of each, asking again as soon as they have an
    answer, until those of the first key are through."""
    plans = []
    for number, start in enumerate(arrivals(rng, clients * len(keys), 0.5)):
        key = keys[number % len(keys)]
        asked = tuple(short(texts, rng, max_tokens=48) for _ in range(turns))
        plans.append(Client(start, asked, group=key, until=keys[0] if key != keys[0] else None))
    return plans


def flooded(
    texts: Texts, rng: Random, *, flood: int = 32, singles: int = 20, answer: int = 256
) -> list[Client]:
    """One key asks for many long answers at once; another asks for one short answer after the other. The
    flood ends with the singles, whose time it must outlast."""
    plans = [
        Client(start, (short(texts, rng, max_tokens=answer),), group="flood", until="single")
        for start in arrivals(rng, flood, 0.2)
    ]
    asked = [short(texts, rng, max_tokens=16) for _ in range(singles)]
    paced = tuple(replace(turn, pause_s=rng.uniform(0.05, 0.3)) for turn in asked)
    return [*plans, Client(0.5, paced, group="single")]


def many_short(texts: Texts, rng: Random, *, requests: int = 2000, clients: int = 8) -> list[Client]:
    """A great many small requests, no two alike: what a server keeps of each adds up."""
    plans = []
    for number, start in enumerate(arrivals(rng, clients, 0.5)):
        mine = len(range(number, requests, clients))
        turns = (_small(texts, rng, tokens=rng.randrange(30, 60)) for _ in range(mine))
        plans.append(Client(start, tuple(turns)))
    return plans


def _small(texts: Texts, rng: Random, *, tokens: int) -> Turn:
    return Turn((user(texts.fresh(rng, tokens)),), rng.randrange(2, 6))


def grounded(
    texts: Texts, rng: Random, *, clients: int = 1, questions: int = 6, passages: int = 5
) -> list[Client]:
    """Answers that quote: numbered passages, and the request to repeat one of them word for word."""
    return [
        Client(start, tuple(quotation(texts, rng, passages) for _ in range(questions)))
        for start in arrivals(rng, clients, 0.2)
    ]


def quotation(texts: Texts, rng: Random, passages: int) -> Turn:
    """One extraction over passages of its own. EOS counts: text past a quotation is not grounded."""
    quoted = [f"[{n}] {texts.fresh(rng, 100)}" for n in range(1, passages + 1)]
    wanted = rng.randrange(1, passages + 1)
    ask = f"Quote passage [{wanted}] in full, word for word. Write nothing else."
    return Turn((user("\n\n".join([*quoted, ask])),), 128, ignore_eos=False)
