"""What becomes of requests when the process dies: nobody pays for another's request."""

import asyncio
import os
import signal
from dataclasses import replace

import pytest

from engine import client, wire
from engine.client import Engine
from engine.request import (
    Delta,
    Done,
    EngineConfig,
    EngineRestarted,
    EngineUnavailable,
    GenerationRequest,
    ModelLoadFailed,
    Sampling,
)
from engine.stats import EngineStats
from tests.engine.conftest import running

DONE = Done("length", 1, 1)


class FakeProcess:
    """A process that does what the test says; `all` are those that were launched."""

    all: "list[FakeProcess]"
    refusals: int  # of the next launches

    def __init__(self) -> None:
        self.sent: list[wire.Command] = []
        self.busy_with: frozenset[int] = frozenset()
        self.pid = len(self.all)
        self._ended = asyncio.Event()
        self._deliver = lambda _: None

    @classmethod
    async def launch(cls, _config):
        if cls.refusals:
            cls.refusals -= 1
            raise ModelLoadFailed("the file is gone")
        cls.all.append(cls())
        return cls.all[-1], None

    def send(self, command):
        self.sent.append(command)

    async def run(self, deliver):
        self._deliver = deliver
        await self._ended.wait()

    async def stop(self):
        pass

    def obituary(self):
        return "its process ended (killed by signal 6)"

    def die(self, *busy_with: int):
        """It ends while it works on these."""
        self.busy_with = frozenset(busy_with)
        self._ended.set()

    def answer(self, id: int, *events):
        self._deliver(wire.Outputs([(id, event) for event in events]))

    @property
    def ids(self) -> list[int]:
        """Requests that it was given."""
        return [each.id for each in self.sent if isinstance(each, wire.Submit)]

    @property
    def prompts(self) -> list[str]:
        requests = [each.request for each in self.sent if isinstance(each, wire.Submit)]
        return [str(each.prompt) for each in requests if isinstance(each, GenerationRequest)]


class Stage:
    """An engine over fake processes, and requests named by their prompts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.tasks: dict[str, asyncio.Task[str]] = {}
        self.pieces: dict[str, list[Delta]] = {}

    @property
    def process(self) -> FakeProcess:
        return FakeProcess.all[-1]

    async def ask(self, *prompts: str, **options) -> None:
        for prompt in prompts:
            self.tasks[prompt] = asyncio.create_task(self._read(GenerationRequest(prompt, **options)))
        await settle()

    async def _read(self, request: GenerationRequest) -> str:
        text = ""
        pieces = self.pieces[str(request.prompt)] = []
        async for event in self.engine.submit(request):
            if isinstance(event, Delta):
                pieces.append(event)
                text = ("" if event.anew else text) + event.text
        return text

    def id(self, prompt: str) -> int:
        """Of the request, in the process that runs."""
        return self.process.ids[self.process.prompts.index(prompt)]

    async def write(self, prompt: str, text: str = "x", *, end: bool = False) -> None:
        self.process.answer(self.id(prompt), Delta(text, (1,)), *([DONE] if end else []))
        await settle()

    async def die_of(self, *prompts: str) -> None:
        self.process.die(*(self.id(prompt) for prompt in prompts))
        await settle()

    async def outcome(self, prompt: str) -> str:
        try:
            return await self.tasks[prompt]
        except (EngineRestarted, EngineUnavailable) as error:
            return f"{type(error).__name__}: {error}"

    def waits(self, *prompts: str) -> bool:
        return not any(self.tasks[prompt].done() for prompt in prompts)


async def settle() -> None:
    """Everything that can happen now has happened."""
    for _ in range(30):
        await asyncio.sleep(0)


@pytest.fixture
def play(monkeypatch, tmp_path):
    """A function that runs `scenario(stage)`."""
    FakeProcess.all, FakeProcess.refusals = [], 0
    monkeypatch.setattr(client, "Process", FakeProcess)
    monkeypatch.setattr(client, "RESTART_PAUSE_S", 0.001)

    def run(scenario) -> None:
        async def main():
            stage = Stage(await Engine.start(EngineConfig(tmp_path / "model.gguf")))
            try:
                await scenario(stage)
            finally:
                await stage.engine.close()
                await asyncio.gather(*stage.tasks.values(), return_exceptions=True)

        asyncio.run(asyncio.wait_for(main(), 30))

    return run


def test_the_queue_outlives_any_number_of_deaths(play):
    async def scenario(stage):
        await stage.ask("a", "b", "c")
        for _ in range(5):
            stage.process.die()
            await settle()
            assert stage.process.prompts == ["a", "b", "c"]
        for prompt in ("a", "b", "c"):
            await stage.write(prompt, "well", end=True)
            assert await stage.outcome(prompt) == "well"

    play(scenario)


def test_a_request_that_kills_twice_fails_and_takes_nobody_along(play):
    async def scenario(stage):
        await stage.ask("innocent", "poison", "queued")
        await stage.die_of("innocent", "poison")
        assert stage.process.prompts == ["innocent"], "alone"
        await stage.write("innocent")
        assert stage.process.prompts == ["innocent", "poison"], "the queue waits until it is known who kills"
        await stage.die_of("poison")
        assert "stopped twice while it computed" in await stage.outcome("poison")
        assert "send it again" in await stage.outcome("innocent"), "it had begun to stream"
        assert stage.process.prompts == ["queued"]
        await stage.write("queued", "well", end=True)
        assert await stage.outcome("queued") == "well"

    play(scenario)


def test_suspects_are_tried_before_new_requests_which_wait(play):
    async def scenario(stage):
        await stage.ask("one", "two")
        await stage.die_of("one", "two")
        await stage.ask("new")
        assert stage.process.prompts == ["one"]
        stage.tasks["one"].cancel()
        await settle()
        assert stage.process.prompts == ["one", "two"], "who went away is tried no more"
        await stage.write("two")
        assert stage.process.prompts == ["one", "two", "new"]

    play(scenario)


def test_a_suspect_that_takes_long_lets_others_go_on(play, monkeypatch):
    monkeypatch.setattr(client, "TRIAL_S", 0.0)

    async def scenario(stage):
        await stage.ask("long", "other")
        await stage.die_of("long")
        await asyncio.sleep(0.01)
        assert stage.process.prompts == ["long", "other"]

    play(scenario)


def test_what_begun_to_stream_fails_and_what_was_not_passed_on_begins_anew(play):
    async def scenario(stage):
        await stage.ask("stream")
        await stage.ask("whole", replayable=True)
        await stage.write("stream", "St")
        await stage.write("whole", "Wh")
        await stage.die_of("stream", "whole")
        assert "send it again: its process ended (killed by signal 6)" in await stage.outcome("stream")
        assert stage.process.prompts == ["whole"]
        await stage.write("whole", "Whole", end=True)
        assert await stage.outcome("whole") == "Whole"
        assert [each.anew for each in stage.pieces["whole"]] == [False, True, False]

    play(scenario)


def test_a_replayable_request_that_was_there_at_two_deaths_fails(play):
    async def scenario(stage):
        await stage.ask("whole", replayable=True)
        for _ in range(2):
            assert stage.waits("whole")
            await stage.write("whole", "Wh")
            await stage.die_of("whole")
        assert "stopped twice" in await stage.outcome("whole")

    play(scenario)


def test_an_answer_that_is_complete_is_not_asked_for_again(play):
    async def scenario(stage):
        await stage.ask("whole", replayable=True)
        id = stage.id("whole")
        stage.process.answer(id, Delta("Whole", (1,)), DONE)
        stage.process.die(id)
        assert await stage.outcome("whole") == "Whole"
        await settle()
        assert stage.process.prompts == []

    play(scenario)


def test_requests_wait_while_the_process_does_not_start(play):
    async def scenario(stage):
        FakeProcess.refusals = 4
        await stage.ask("queued")
        stage.process.die()
        while len(FakeProcess.all) == 1:
            assert stage.waits("queued")
            await asyncio.sleep(0.001)
        await settle()
        await stage.write("queued", "well", end=True)
        assert await stage.outcome("queued") == "well"

    play(scenario)


def test_past_the_deadline_they_fail_with_the_reason_and_new_ones_are_told_at_once(play, monkeypatch):
    monkeypatch.setattr(client, "RESTART_WAIT_S", 0.02)

    async def scenario(stage):
        FakeProcess.refusals = 10**9
        await stage.ask("queued")
        stage.process.die()
        assert "cannot be started again: the file is gone" in await stage.outcome("queued")
        await stage.ask("new")
        assert "cannot be started again: the file is gone" in await stage.outcome("new")
        FakeProcess.refusals = 0
        while not stage.engine.alive:
            await asyncio.sleep(0.001)
        await stage.ask("later")
        await stage.write("later", "well", end=True)
        assert await stage.outcome("later") == "well"

    play(scenario)


def test_a_question_is_asked_again_once(play):
    async def scenario(stage):
        asked = [asyncio.create_task(stage.engine.tokenize(text)) for text in ("poison", "good")]
        await settle()
        for _ in range(2):
            assert [each.text for each in stage.process.sent] == ["poison", "good"]
            stage.process.die(stage.process.sent[0].id)
            await settle()
        (good,) = stage.process.sent
        stage.process._deliver(wire.Answer(good.id, [7]))
        assert await asked[1] == [7]
        with pytest.raises(EngineRestarted, match="twice"):
            await asked[0]

    play(scenario)


def test_counters_run_on_over_a_death(play):
    async def scenario(stage):
        await stage.ask("a")
        stats = EngineStats(1, 0, 1, 1, 0, 0, requests_total=3)
        stage.process._deliver(wire.Outputs([(stage.id("a"), Delta("x", (1,)))], stats))
        await stage.die_of("a")
        asked = asyncio.create_task(stage.engine.stats())
        await settle()
        question = stage.process.sent[-1]
        stage.process._deliver(wire.Answer(question.id, EngineStats(0, 0, 1, 1, 0, 0, requests_total=2)))
        assert (await asked).requests_total == 5

    play(scenario)


# The real process.


async def text_of(engine: Engine, request: GenerationRequest) -> str:
    text = ""
    async for event in engine.submit(request):
        if isinstance(event, Delta):
            text = ("" if event.anew else text) + event.text
    return text


async def piece(stream) -> Delta:
    event = await anext(stream)
    assert isinstance(event, Delta)
    return event


def test_killed_twice_the_one_that_ran_fails_and_the_queue_is_served(smollm2_gguf):
    config = EngineConfig(smollm2_gguf, n_ctx=512, n_parallel=1, n_threads=1, n_batch=64)
    short = GenerationRequest("Two", Sampling(temperature=0), max_tokens=2, ignore_eos=True)
    long = replace(short, prompt="The capital of France is", max_tokens=400, replayable=True)

    async def main():
        async with running(config) as engine:
            alone = await text_of(engine, short)
            stream = engine.submit(long)
            assert (await piece(stream)).text, "it is in the slot"
            queued = [asyncio.create_task(text_of(engine, short)) for _ in range(3)]
            os.kill(engine.pid or 0, signal.SIGKILL)
            while not (await piece(stream)).anew:
                pass
            assert (await piece(stream)).text, "it is in the slot again"
            os.kill(engine.pid or 0, signal.SIGKILL)
            with pytest.raises(EngineRestarted, match="twice"):
                async for _ in stream:
                    pass
            assert [await each for each in queued] == [alone] * 3

    asyncio.run(main())
