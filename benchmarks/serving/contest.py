"""Two servers side by side, the rounds of a scenario alternating between them.

Both run for the whole scenario: an idle server takes memory and no time. Each scenario starts its own, since
its slots and its context are its own, and so that none inherits what another left in a cache.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Literal

import httpx

from benchmarks import servers
from benchmarks.serving import keys as api_keys
from benchmarks.serving.catalogue import Scenario, Shape
from benchmarks.serving.load import Round, Target, run_round
from benchmarks.serving.play import play
from benchmarks.serving.scenarios import chats
from benchmarks.serving.texts import Texts

Program = Literal["lq", "llama-server"]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server to be measured: which program, with which options beyond those of the scenario."""

    name: str
    program: Program
    options: tuple[str, ...] = ()

    @property
    def running_metric(self) -> str:
        """The gauge of sequences that are being decoded."""
        return "lq_engine_running" if self.program == "lq" else "llamacpp:requests_processing"

    def command(self, model: Path, port: int, *, threads: int, shape: Shape, slots: int) -> list[str]:
        """How it is started."""
        made = servers.lq_command if self.program == "lq" else servers.llama_server_command
        return made(
            model, port=port, threads=threads, n_ctx=shape.n_ctx, n_parallel=slots, kv_cells=shape.kv_cells,
            options=self.options,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all scenarios of a run."""

    threads: int
    slots: int
    rounds: int
    quick: bool
    timeout_s: float
    logs: Path
    n_ctx: int | None = None

    def shape(self, scenario: Scenario) -> tuple[Shape, int]:
        """The shape of both servers and their slots."""
        shape = scenario.shape
        if self.n_ctx:
            shape = replace(shape, n_ctx=self.n_ctx)
        return shape, shape.slots or self.slots


@dataclass(slots=True)
class Result:
    """A scenario's rounds by contestant, in order; `problem` says why there are none. `model`: the file."""

    scenario: str
    contestants: tuple[Contestant, Contestant]
    rounds: dict[str, list[Round]] = field(default_factory=dict)
    memory_bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str | None = None
    model: str = ""


def sized_texts(model: Path, logs: Path) -> Texts:
    """Texts sized by llama-server's tokenizer, from one that runs only for this."""
    port = servers.free_port()
    command = servers.llama_server_command(model, port=port, threads=1, n_ctx=512, n_parallel=1)
    with (
        servers.running(command, port, logs / "tokenizer.log"),
        httpx.Client(base_url=f"http://127.0.0.1:{port}") as client,
    ):

        def count(text: str) -> int:
            answer = client.post("/tokenize", json={"content": text}).raise_for_status()
            return len(answer.json()["tokens"])

        return Texts.sized(count)


def contest(
    name: str,
    scenario: Scenario,
    pair: tuple[Contestant, Contestant],
    model: Path,
    texts: Texts,
    *,
    settings: Settings,
    say: Say,
) -> Result:
    """Measure one scenario. What keeps a server from starting is the result's `problem`, not an error."""
    result = Result(name, pair, {each.name: [] for each in pair}, model=model.name)
    began = time.monotonic()
    try:
        with _both(pair, name, scenario, model, settings) as running:
            targets = {
                each: _target(each, server, settings.timeout_s, keys=scenario.keys)
                for each, server in running.items()
            }
            for target in targets.values():
                asyncio.run(run_round(target, chats(texts, Random("warm"), clients=4, max_tokens=8)))
            rounds = min(settings.rounds, scenario.rounds or settings.rounds)
            for number in range(rounds):
                for each in pair if number % 2 == 0 else reversed(pair):
                    alone = scenario.asks_alone and number == 0 and each.program == "lq"
                    played = play(
                        targets[each], scenario, texts, f"{name}/{number}", quick=settings.quick,
                        asks_alone=alone,
                    )  # fmt: skip
                    result.rounds[each.name].append(played)
                    say(f"  round {number + 1}/{rounds}  {told(each, scenario, played)}")
            result.memory_bytes = {each.name: server.memory_bytes() for each, server in running.items()}
    except servers.NotStarted as error:
        result.problem = str(error)
    result.seconds = time.monotonic() - began
    return result


def told(contestant: Contestant, scenario: Scenario, played: Round) -> str:
    """The first figures of a round, for the progress line."""
    values = scenario.evaluate(played)
    parts = [f"{contestant.name:13}"]
    for figure in scenario.shows[:3]:
        value = values.get(figure)
        parts.append(f"{figure} {'none' if value is None else f'{value:.3g}'}")
    parts.append(f"{values['failed']:.0f} of {values['requests']:.0f} failed")
    parts.append(f"({max((each.ended_s for each in played.outcomes), default=0.0):.1f} s)")
    return "  ".join(parts)


@contextmanager
def _both(
    pair: tuple[Contestant, Contestant], name: str, scenario: Scenario, model: Path, settings: Settings
) -> Iterator[dict[Contestant, servers.Server]]:
    """Both contestants, healthy; stopped when the block ends, however it ends."""
    shape, slots = settings.shape(scenario)
    with ExitStack() as stack:
        running = {}
        for number, each in enumerate(pair):
            port = servers.free_port()
            command = each.command(model, port, threads=settings.threads, shape=shape, slots=slots)
            if scenario.keys and each.program == "lq":
                config = settings.logs / f"{name}.toml"
                config.write_text(api_keys.settings(scenario.keys), "utf-8")
                command += ["--config", str(config)]
            log = settings.logs / f"{name}-{number}-{each.program}.log"
            running[each] = stack.enter_context(servers.running(command, port, log))
        yield running


def _target(
    contestant: Contestant, server: servers.Server, timeout_s: float, *, keys: Iterable[str]
) -> Target:
    """The server as the clients see it; `keys`: groups that have an API key."""
    secrets = {group: api_keys.secret(group) for group in keys}
    key = next(iter(secrets.values()), None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    models = httpx.get(f"{server.url}/models", headers=headers, timeout=30).raise_for_status().json()
    return Target(
        server.port, models["data"][0]["id"], contestant.running_metric, timeout_s, keys=secrets,
        held_bytes=server.memory_bytes,
    )  # fmt: skip
