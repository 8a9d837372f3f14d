"""The engine in its own process: streams, cancellation, death and rebirth; an event loop that never waits."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from engine.client import Engine
from engine.llama import without_kernels
from engine.request import (
    ContextOverflow,
    Delta,
    Done,
    EngineConfig,
    EngineRestarted,
    EngineUnavailable,
    GenerationRequest,
    InvalidRequest,
    ModelLoadFailed,
    QueueFull,
    Sampling,
)
from tests.engine.conftest import running

GREEDY = Sampling(temperature=0)


@pytest.fixture
def config(smollm2_gguf: Path) -> EngineConfig:
    return EngineConfig(smollm2_gguf, n_ctx=512, n_parallel=2, n_threads=1, n_batch=64)


def ask(prompt: str | tuple[int, ...] = "The capital of France is", **options) -> GenerationRequest:
    return GenerationRequest(prompt, **({"sampling": GREEDY, "max_tokens": 6, "ignore_eos": True} | options))


async def answer(engine: Engine, request: GenerationRequest) -> tuple[str, Done]:
    text = ""
    async for event in engine.submit(request):
        if isinstance(event, Done):
            return text, event
        text += event.text
    raise AssertionError("no Done")


async def settled(engine: Engine, **expected: int):
    """Wait until the statistics say so."""
    for _ in range(600):
        stats = await engine.stats()
        if all(getattr(stats, name) == value for name, value in expected.items()):
            return stats
        await asyncio.sleep(0.05)
    raise AssertionError(f"{stats} never had {expected}")


def test_streams_tokens_and_answers_questions(config):
    async def main():
        async with running(config) as engine:
            assert engine.alive
            assert engine.info.n_ctx == 512
            assert engine.info.architecture == "llama"
            together = await asyncio.gather(*(answer(engine, ask()) for _ in range(4)))
            assert len({text for text, _ in together}) == 1
            assert together[0][1].finish_reason == "length"
            tokens = await engine.tokenize("Hello world")
            assert await engine.detokenize(tokens) == "Hello world"
            stats = await engine.stats()
            assert (stats.requests_total, stats.completion_tokens_total) == (4, 24)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("options", "unified", "guesses", "kernels"),
    [
        ({}, False, "lookup", ("attention", "weights")),
        ({"kv_cells": 600, "kv_type_k": "q8_0", "speculation": "off"}, True, "off", ("weights",)),
    ],
)
def test_an_engine_says_what_it_can_do_and_what_its_slots_do(config, options, unified, guesses, kernels):
    async def main():
        async with running(replace(config, n_gpu_layers=0, **options)) as engine:
            info = engine.info
            assert (info.unified, info.shares_prefixes, info.guesses) == (unified, True, guesses)
            assert info.kernels == (() if without_kernels() else kernels)
            assert info.flash_attention is True
            stream = engine.submit(ask(max_tokens=400))
            await anext(stream)
            stats = await engine.stats()
            assert {each.state for each in stats.slots} == {"writing", "idle"}
            (busy,) = (each for each in stats.slots if each.state == "writing")
            assert busy.n_tokens == stats.kv_cells_used > 0
            assert busy.age_s
            assert 0 < busy.age_s < 60
            assert stats.kv_cells_used + stats.kv_cells_free == stats.kv_cells_total
            await stream.aclose()
            stats = await settled(engine, running=0)
            assert [each.state for each in stats.slots] == ["idle"] * 2
            assert sum(stats.stall_counts) > 0

    asyncio.run(main())


def test_bad_requests_and_questions_leave_the_engine_well(config):
    async def main():
        async with running(config) as engine:
            pid = engine.pid
            for request, error in (
                (ask(tuple(range(100, 612))), ContextOverflow),
                (ask((10**6,)), InvalidRequest),
                (ask(sampling=Sampling(temperature=float("nan"))), InvalidRequest),
                (ask(sampling=Sampling(grammar="root ::= x"), ignore_eos=False), InvalidRequest),
            ):
                with pytest.raises(error):
                    await answer(engine, request)
            with pytest.raises(InvalidRequest):
                await engine.detokenize([10**6])
            with pytest.raises(InvalidRequest):
                await engine.tokenize("\ud800")
            await answer(engine, ask())
            assert engine.pid == pid

    asyncio.run(main())


def test_a_client_that_goes_away_frees_its_sequence_within_one_step(config):
    async def main():
        async with running(replace(config, n_parallel=1)) as engine:
            stream = engine.submit(ask(max_tokens=400))
            assert isinstance(await anext(stream), Delta)
            waiting = asyncio.create_task(answer(engine, ask("Two", max_tokens=1)))
            await settled(engine, waiting=1)
            before = (await engine.stats()).decode_steps_total
            await stream.aclose()
            stats = await engine.stats()  # read after the cancellation, before any further step
            assert stats.cancelled_total == 1
            assert stats.decode_steps_total <= before + 2  # those that ran before the messages came
            assert (await waiting)[1].n_completion_tokens == 1

    asyncio.run(main())


def test_a_cancelled_task_frees_its_sequence_running_or_waiting(config):
    async def main():
        async with running(replace(config, n_parallel=1)) as engine:
            tasks = [asyncio.create_task(answer(engine, ask(max_tokens=400))) for _ in range(5)]
            await settled(engine, running=1, waiting=4)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await settled(engine, running=0, waiting=0, cancelled_total=5)

    asyncio.run(main())


def test_a_full_queue_refuses(config):
    async def main():
        async with running(replace(config, n_parallel=1, max_queue=1)) as engine:
            tasks = [asyncio.create_task(answer(engine, ask(max_tokens=60))) for _ in range(2)]
            await settled(engine, running=1, waiting=1)
            with pytest.raises(QueueFull) as caught:
                await answer(engine, ask())
            assert caught.value.retry_after_s > 0
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_killed_the_begun_request_fails_the_others_are_sent_again(config):
    async def main():
        async with running(replace(config, n_parallel=1)) as engine:
            begun = engine.submit(ask(max_tokens=400))
            await anext(begun)
            queued = asyncio.create_task(answer(engine, ask(max_tokens=2)))
            await settled(engine, waiting=1)
            pid = engine.pid
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(EngineRestarted, match="signal 9"):
                async for _ in begun:
                    pass
            assert (await queued)[1].n_completion_tokens == 2
            assert (await answer(engine, ask(max_tokens=2)))[1].n_completion_tokens == 2
            assert engine.alive
            assert engine.pid != pid
            assert (await engine.stats()).restarts_total == 1

    asyncio.run(main())


def test_a_model_that_vanished_makes_the_engine_unavailable_then_well_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr("engine.client.RESTART_WAIT_S", 2.0)

    async def main():
        path = tmp_path / "model.gguf"
        path.symlink_to(config.model_path)
        async with running(replace(config, model_path=path)) as engine:
            path.unlink()
            stream = engine.submit(ask(max_tokens=400))
            await anext(stream)
            os.kill(engine.pid, signal.SIGKILL)
            with pytest.raises(EngineRestarted):
                async for _ in stream:
                    pass
            with pytest.raises(EngineUnavailable, match="cannot be started again"):
                await answer(engine, ask())
            path.symlink_to(config.model_path)
            while not engine.alive:
                await asyncio.sleep(0.05)
            await answer(engine, ask())

    asyncio.run(main())


def test_closing_fails_what_runs_and_leaves_no_process(config):
    async def main():
        engine = await Engine.start(config)
        pid = engine.pid
        task = asyncio.create_task(answer(engine, ask(max_tokens=400)))
        await settled(engine, running=1)
        await engine.close()
        with pytest.raises(EngineUnavailable):
            await task
        with pytest.raises(EngineUnavailable):
            await answer(engine, ask())
        assert not psutil.pid_exists(pid)
        assert engine.pid is None

    asyncio.run(main())


def test_a_broken_file_is_refused_with_the_reason(config, tmp_path):
    truncated = tmp_path / "truncated.gguf"
    truncated.write_bytes(config.model_path.read_bytes()[:100_000])
    for path in (truncated, tmp_path / "missing.gguf"):
        with pytest.raises(ModelLoadFailed, match=path.name) as caught:
            asyncio.run(Engine.start(replace(config, model_path=path)))
        assert len(str(caught.value)) > len(str(path)) + 10


def test_a_start_that_is_cancelled_leaves_no_process(config):
    async def main():
        before = {child.pid for child in psutil.Process().children()}
        task = asyncio.create_task(Engine.start(config))
        while {child.pid for child in psutil.Process().children()} <= before:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert {child.pid for child in psutil.Process().children()} <= before

    asyncio.run(main())


def test_the_event_loop_is_never_blocked(config):
    async def main():
        async with running(replace(config, n_ctx=1024, n_batch=512)) as engine:
            ticks = 0

            async def tick():
                nonlocal ticks
                while True:
                    await asyncio.sleep(0.005)
                    ticks += 1

            ticking = asyncio.create_task(tick())
            await answer(engine, ask(tuple(100 + i % 900 for i in range(600)), max_tokens=1))
            ticking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await ticking
            assert ticks > 10  # one native call takes longer than ten ticks

    asyncio.run(main())


def test_the_process_ends_with_its_parent(config):
    code = f"""
import asyncio, os
from pathlib import Path
from engine.client import Engine
from engine.request import EngineConfig
async def main():
    engine = await Engine.start(EngineConfig(Path({str(config.model_path)!r}), n_ctx=64, n_threads=1))
    print(engine.pid, flush=True)
    os._exit(1)
asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=False)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(timeout=30)
    assert not psutil.pid_exists(int(done.stdout))
