"""`python -m benchmarks.rounding`: rounding a matrix by compiled loops against the same in torch, one thread.

For every format a matrix of the shape of SmolLM2's down projection and a Hessian of correlated columns; both
ways in turn, medians. No peer: llama.cpp has no rounding under a Hessian.
"""

import argparse
import sys
from statistics import median
from time import perf_counter

import numpy as np
import torch

from quantize.gguf_files.packing import FORMATS
from quantize.rounding import kernels
from quantize.rounding.curvature import Curvature, prepare
from quantize.rounding.matrix import round_matrix

ROWS, COLUMNS, TOKENS = 576, 1536, 4096


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rounding", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="both ways so often")
    rounds = parser.parse_args().rounds
    if not kernels.are_there():
        parser.error(f"{kernels.library_path()} is missing; install lq where a C++ compiler is")
    torch.set_num_threads(1)
    weights, curvature = example()
    print("| format | torch s | compiled s | ratio | loss compiled / torch |\n|---|---:|---:|---:|---:|")
    there = kernels.are_there
    for name in FORMATS:
        seconds, losses = {False: [], True: []}, {}
        for _ in range(rounds):
            for compiled in (False, True):
                kernels.are_there = there if compiled else (lambda: False)
                start = perf_counter()
                losses[compiled] = round_matrix(weights, name, hessian=curvature).loss
                seconds[compiled].append(perf_counter() - start)
        slow, fast = (median(seconds[compiled]) for compiled in (False, True))
        ratio, loss = slow / fast, losses[True] / losses[False]
        print(f"| {name} | {slow:.2f} | {fast:.2f} | {ratio:.2f} | {loss:.4f} |", flush=True)
    return 0


def example() -> tuple[np.ndarray, Curvature]:
    """Weights (ROWS, COLUMNS) and what errors of theirs cost."""
    draw = np.random.default_rng(0)
    weights = draw.standard_t(5, (ROWS, COLUMNS)).astype(np.float32) * 0.05
    mixing = draw.standard_normal((COLUMNS, COLUMNS)).astype(np.float32) / COLUMNS**0.5
    inputs = draw.standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    inputs += inputs @ mixing
    return weights, prepare(inputs.T @ inputs / TOKENS, n_tokens=TOKENS)


if __name__ == "__main__":
    sys.exit(main())
