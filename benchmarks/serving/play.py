"""One round of a scenario against one server, with all that the scenario wants to know beside it."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.serving.alone import Solo, ask_alone
from benchmarks.serving.catalogue import Scenario
from benchmarks.serving.load import Round, Target, request_body, run_round
from benchmarks.serving.plan import Client
from benchmarks.serving.texts import Texts

SETTLE_S = 0.5  # after a round: requests that were left end, OpenMP's threads stop spinning

CONTROLS = 8  # clients whose requests are asked alone twice: what differs there is not the load's doing


def play(
    target: Target, scenario: Scenario, texts: Texts, seed: str, *, quick: bool, asks_alone: bool
) -> Round:
    """The round of a seed; the same seed gives both servers the same."""
    clients = scenario.clients(texts, seed, quick=quick)
    time.sleep(SETTLE_S)
    watch = scenario.watches_memory
    played = asyncio.run(run_round(target, clients, leavers=scenario.leavers, watch_memory=watch))
    if scenario.without:
        again = seed if scenario.same_texts else f"{seed}/without"
        others = scenario.clients(texts, again, quick=quick)
        time.sleep(SETTLE_S)
        played = replace(played, without=asyncio.run(run_round(target, staying(others, scenario.without))))
    if asks_alone:
        time.sleep(SETTLE_S)
        alone = asyncio.run(one_by_one(target, clients))
        again = asyncio.run(one_by_one(target, clients[:CONTROLS]))
        played = replace(played, alone=alone, again=again)
    return played


def staying(clients: Sequence[Client], without: str) -> list[Client]:
    """All clients but those of a group."""
    return [client for client in clients if client.group != without]


async def one_by_one(target: Target, clients: Sequence[Client]) -> tuple[Solo, ...]:
    """Every request of a plan, asked while no other is. Plans whose answers go into a history have none."""
    answers = []
    for number, client in enumerate(clients):
        for index, turn in enumerate(client.turns):
            solo = await ask_alone(
                target.port,
                request_body(target.model, turn.messages, turn),
                client=number,
                turn=index,
                key=target.key(client.group),
                timeout_s=target.timeout_s,
            )
            answers.append(solo)
    return tuple(answers)
