"""Speed of an engine under a number of concurrent requests, in tokens/s.

Every prompt is distinct from its first token on, so that no cached prefix flatters the figures.
"""

import asyncio
import random
import statistics
import time
from dataclasses import asdict, dataclass

from engine.client import Engine
from engine.request import Delta, EngineConfig, EngineInfo, GenerationRequest, Sampling


@dataclass(frozen=True, slots=True)
class Load:
    """Medians over the rounds at one number of concurrent requests."""

    streams: int
    prefill_tps: float  # prompt tokens of all requests / seconds until each had its first token
    decode_tps: float  # tokens that all requests wrote after that / seconds until the last one
    ttft_ms: float  # median over the requests

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def measure(
    config: EngineConfig, *, loads: list[int], prompt_tokens: int, tokens: int, rounds: int
) -> tuple[EngineInfo, list[Load]]:
    """Start an engine, run every load `rounds` times after one to warm up, and stop it."""
    return asyncio.run(_measure(config, loads, prompt_tokens, tokens, rounds))


async def _measure(
    config: EngineConfig, loads: list[int], prompt_tokens: int, tokens: int, rounds: int
) -> tuple[EngineInfo, list[Load]]:
    engine = await Engine.start(config)
    try:
        chance = random.Random(0)
        rows = []
        await _round(engine, chance, 1, prompt_tokens, tokens)
        for streams in loads:
            runs = [await _round(engine, chance, streams, prompt_tokens, tokens) for _ in range(rounds)]
            columns = zip(*runs, strict=True)
            rows.append(Load(streams, *(statistics.median(column) for column in columns)))
        return engine.info, rows
    finally:
        await engine.close()


async def _round(
    engine: Engine, chance: random.Random, streams: int, prompt_tokens: int, tokens: int
) -> tuple[float, float, float]:
    """(prefill tokens/s, decode tokens/s, median milliseconds to the first token) of one round."""
    prompts = [
        tuple(chance.randrange(engine.info.n_vocab // 2) for _ in range(prompt_tokens))
        for _ in range(streams)
    ]
    started = time.perf_counter()
    writings = await asyncio.gather(*(_writing(engine, prompt, tokens) for prompt in prompts))
    firsts = [writing[0][0] for writing in writings]
    prefilled = max(firsts)
    ended = max(writing[-1][0] for writing in writings)
    after = sum(count for writing in writings for stamp, count in writing if stamp > prefilled)
    ttft_ms = 1000 * statistics.median(first - started for first in firsts)
    return streams * prompt_tokens / (prefilled - started), after / (ended - prefilled), ttft_ms


async def _writing(engine: Engine, prompt: tuple[int, ...], tokens: int) -> list[tuple[float, int]]:
    """(time, number of tokens) of everything one request wrote."""
    request = GenerationRequest(prompt, Sampling(temperature=0), max_tokens=tokens, ignore_eos=True)
    events = engine.submit(request)
    return [(time.perf_counter(), len(event.tokens)) async for event in events if isinstance(event, Delta)]
