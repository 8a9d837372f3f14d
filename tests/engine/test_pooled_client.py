"""Embeddings and scores from an engine's process: wrong kinds, cancellation, death and rebirth."""

import asyncio
import os
import signal
from contextlib import aclosing
from dataclasses import replace

import numpy as np
import pytest

from engine.client import Engine
from engine.request import (
    EngineConfig,
    EngineRestarted,
    EngineUnavailable,
    GenerationRequest,
    InputTooLong,
    InvalidRequest,
    ModelLoadFailed,
    Pooled,
    PooledRequest,
    QueueFull,
    Read,
    Tenant,
)
from tests import tiny_models as tiny
from tests.engine.conftest import running

TEXTS = ["the cat sleeps", "a dog", "where is the red house?"]


@pytest.fixture(scope="module")
def embedding(tmp_path_factory) -> EngineConfig:
    path = tiny.bert(tmp_path_factory.mktemp("bert") / "embedding.gguf")
    return EngineConfig(path, kind="embedding", n_threads=1, n_batch=32)


@pytest.fixture(scope="module")
def ranking(tmp_path_factory) -> EngineConfig:
    path = tiny.bert(tmp_path_factory.mktemp("bert") / "rank.gguf", pooling="rank", head=True)
    return EngineConfig(path, kind="rerank", n_threads=1)


async def pooled(engine: Engine, request: PooledRequest) -> Pooled:
    """What a request gives at last."""
    async with aclosing(engine.pool(request)) as events:
        async for event in events:
            if isinstance(event, Pooled):
                return event
    raise AssertionError("no end")


async def embed(engine: Engine, texts: list[str], tenant: Tenant = Tenant()) -> Pooled:  # noqa: B008
    return await pooled(engine, PooledRequest(tuple(texts), tenant=tenant))


async def rerank(engine: Engine, query: str, documents: list[str]) -> Pooled:
    return await pooled(engine, PooledRequest(tuple(documents), query))


async def settled(engine: Engine, **expected: int):
    """Wait until the statistics say so."""
    stats = None
    for _ in range(600):
        stats = await engine.stats()
        if all(getattr(stats, name) == value for name, value in expected.items()):
            return stats
        await asyncio.sleep(0.01)
    raise AssertionError(f"{stats} never had {expected}")


def test_embeds_in_its_own_process_and_tells_what_it_is(embedding):
    async def main():
        async with running(embedding) as engine:
            assert (engine.info.n_ctx, engine.info.n_embd, engine.info.pooling) == (96, tiny.WIDTH, "mean")
            several = await asyncio.gather(
                *(embed(engine, TEXTS) for _ in range(5)), embed(engine, TEXTS[:1])
            )
            assert [len(each.values) for each in several] == [3, 3, 3, 3, 3, 1]
            for each in several:
                np.testing.assert_allclose(each.values, several[0].values[: len(each.values)], atol=5e-5)
            assert several[0].n_tokens == 3 * 2 + sum(
                map(len, [await engine.tokenize(text, add_special=False) for text in TEXTS])
            )
            stats = await engine.stats()
            assert (stats.requests_total, stats.failed_total) == (6, 0)
            assert stats.prompt_tokens_total == sum(each.n_tokens for each in several)

    asyncio.run(main())


def test_ranks_documents_in_their_order(ranking):
    async def main():
        async with running(ranking) as engine:
            forth = await rerank(engine, "the cat", TEXTS)
            back = await rerank(engine, "the cat", TEXTS[::-1])
            assert forth.values.shape == (3,)
            np.testing.assert_allclose(forth.values, back.values[::-1], atol=5e-5)
            other = await rerank(engine, "red river", TEXTS)
            assert np.abs(other.values - forth.values).max() > 1e-3

    asyncio.run(main())


def test_a_question_for_another_kind_of_model_is_refused_and_harms_nothing(embedding, ranking, smollm2_gguf):
    async def main():
        async with running(embedding) as engine:
            with pytest.raises(InvalidRequest, match="embeds texts and ranks none"):
                await rerank(engine, "a", TEXTS)
            with pytest.raises(InvalidRequest, match="embeds texts and writes none"):
                await anext(engine.submit(GenerationRequest("a")))
            with pytest.raises(InvalidRequest, match="empty"):
                await embed(engine, [""])
            with pytest.raises(InputTooLong, match="97 tokens and the model reads 96") as caught:
                await embed(engine, ["a", "cat " * 95])
            assert caught.value.index == 1
            assert len((await embed(engine, TEXTS)).values) == 3
        async with running(ranking) as engine:
            with pytest.raises(InvalidRequest, match="give a query"):
                await embed(engine, TEXTS)
        async with running(EngineConfig(smollm2_gguf, n_ctx=64, n_threads=1)) as engine:
            with pytest.raises(InvalidRequest, match="writes text"):
                await embed(engine, TEXTS)

    asyncio.run(main())


def test_an_encoder_is_not_loaded_to_write_text(embedding):
    with pytest.raises(ModelLoadFailed, match="does not write text"):
        asyncio.run(Engine.start(EngineConfig(embedding.model_path)))


def test_a_caller_that_goes_away_cancels_its_work(embedding):
    async def main():
        async with running(embedding) as engine:
            task = asyncio.create_task(embed(engine, ["the cat sleeps " * 8] * 2000))
            await settled(engine, running=1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            stats = await settled(engine, running=0, waiting=0)
            assert stats.cancelled_total == 1
            assert stats.prompt_tokens_total < 2000 * 26

    asyncio.run(main())


def test_a_flood_of_one_key_is_no_more_than_a_neighbour_to_another(embedding):
    """Across the process: what the request says on whose behalf it runs reaches the queue."""

    async def main():
        async with running(replace(embedding, n_parallel=2, max_queue=2)) as engine:
            flood, guest = Tenant("flood"), Tenant("guest")
            long = ["the cat sleeps " * 8] * 2000
            flooding = [asyncio.create_task(embed(engine, long, flood)) for _ in range(4)]
            await settled(engine, requests_total=4)
            with pytest.raises(QueueFull):
                await embed(engine, long, flood)
            assert len((await embed(engine, TEXTS, guest)).values) == 3
            assert not any(task.done() for task in flooding)
            for task in flooding:
                task.cancel()
            await asyncio.gather(*flooding, return_exceptions=True)

    asyncio.run(main())


def test_what_is_read_is_told_on_the_way(embedding):
    async def main():
        async with (
            running(embedding) as engine,
            aclosing(engine.pool(PooledRequest(("the cat sleeps " * 8,) * 20))) as events,
        ):
            found = [event async for event in events]
        assert len(found) > 3
        assert all(isinstance(event, Read) for event in found[:-1])
        assert isinstance(found[-1], Pooled)
        assert sum(event.n_tokens for event in found[:-1]) < found[-1].n_tokens

    asyncio.run(main())


def test_work_that_outlives_its_process_is_done_by_the_next(embedding):
    async def main():
        async with running(embedding) as engine:
            before = await embed(engine, TEXTS)
            task = asyncio.create_task(embed(engine, ["the cat sleeps"] * 2000))
            await settled(engine, running=1)
            os.kill(engine.pid or 0, signal.SIGKILL)
            np.testing.assert_allclose((await task).values[0], before.values[0], atol=5e-5)

    asyncio.run(main())


def test_work_whose_process_dies_twice_fails(embedding):
    async def main():
        async with running(embedding) as engine:
            task = asyncio.create_task(embed(engine, ["the cat sleeps " * 8] * 2000))
            while not task.done():
                if (await engine.stats()).running:
                    os.kill(engine.pid or 0, signal.SIGKILL)  # between two batches it accuses nobody
                    while engine.alive and not task.done():
                        await asyncio.sleep(0.01)
                await asyncio.sleep(0.01)
            with pytest.raises(EngineRestarted):
                await task
            assert len((await embed(engine, TEXTS)).values) == 3

    asyncio.run(main())


def test_closing_fails_what_runs(embedding):
    async def main():
        engine = await Engine.start(embedding)
        task = asyncio.create_task(embed(engine, ["the cat sleeps " * 8] * 2000))
        await settled(engine, running=1)
        await engine.close()
        with pytest.raises(EngineUnavailable):
            await task

    asyncio.run(main())
