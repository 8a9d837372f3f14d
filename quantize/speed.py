"""How fast a file runs on this machine: tokens read and tokens written a second, the median of a few runs.

A quick figure for choosing between files, taken on whatever else the machine is doing; `lq bench` is careful.
"""

import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from engine.llama import Context, Model
from quantize.measure import Backend

PREFILL_TOKENS = 256
DECODE_TOKENS = 32
RUNS = 5


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens a second, one sequence."""

    prefill: float
    decode: float


def measure_speed(path: Path, *, backend: Backend) -> Speed:
    """Read PREFILL_TOKENS in one batch, then write DECODE_TOKENS one by one, RUNS times after a warm-up."""
    n_ctx = PREFILL_TOKENS + DECODE_TOKENS
    with (
        Model.open(path, n_gpu_layers=backend.n_gpu_layers) as model,
        Context.open(
            model, n_ctx=n_ctx, n_batch=PREFILL_TOKENS, n_threads=backend.n_threads, n_outputs_max=1,
            type_k=backend.type_k, type_v=backend.type_v,
        ) as context,
    ):  # fmt: skip
        token = min(model.n_vocab - 1, 100)
        runs = [_run(context, token) for _ in range(RUNS + 1)][1:]
    read, written = zip(*runs, strict=True)
    return Speed(PREFILL_TOKENS / statistics.median(read), DECODE_TOKENS / statistics.median(written))


def _run(context: Context, token: int) -> tuple[float, float]:
    """Seconds to read and seconds to write."""
    context.clear()
    started = time.perf_counter()
    decode(context, [token] * PREFILL_TOKENS, start=0)
    middle = time.perf_counter()
    for i in range(DECODE_TOKENS):
        decode(context, [token], start=PREFILL_TOKENS + i)
    return middle - started, time.perf_counter() - middle


def decode(context: Context, tokens: list[int], *, start: int) -> None:
    """Read tokens of one sequence in one call, and wait for the last one's logits."""
    context.batch.clear()
    last = len(tokens) - 1
    for i, token in enumerate(tokens):
        context.batch.add(token, start + i, 0, output=i == last)
    context.decode()
    context.logits(last)  # waits for the backend


def processor() -> str:
    """The processor's name, for the report."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
