"""`python -m benchmarks.importance MODEL.gguf TEXT`: collecting importance, lq against llama-imatrix.

Same commit of llama.cpp, same model and threads, the same tokens in the same windows; each a process of its
own, from its start to its file, in turn. Prints each round's seconds and the medians.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.peer import peer_binaries
from engine.llama import Model, default_threads
from quantize.calibration.importance import collect

WINDOW = 512


def main() -> int:
    """Compare, or with --ours be what is compared."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.importance", description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF of full precision")
    parser.add_argument("text", type=Path, help="plain text")
    parser.add_argument("--windows", type=int, default=48, help=f"of {WINDOW} tokens")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours is not None:
        ours(args)
        return 0
    seconds: dict[str, list[float]] = {"lq": [], "llama-imatrix": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name in list(seconds) if number % 2 == 0 else reversed(seconds):
                seconds[name].append(timed(name, args, Path(folder)))
            print(", ".join(f"{name} {found[-1]:.1f} s" for name, found in seconds.items()), flush=True)
    middle = {name: median(found) for name, found in seconds.items()}
    tokens = args.windows * WINDOW
    print(
        f"{tokens} tokens, medians: " + ", ".join(f"{name} {value:.1f} s" for name, value in middle.items())
    )
    print(f"lq takes {middle['lq'] / middle['llama-imatrix']:.3f} of llama-imatrix's time")
    return 0


def timed(name: str, args: argparse.Namespace, folder: Path) -> float:
    """Seconds of one process."""
    common = ["--threads", str(args.threads)]
    if name == "lq":
        command = [
            sys.executable, "-m", "benchmarks.importance", str(args.model), str(args.text), *common,
            "--windows", str(args.windows), "--ours", str(folder / "ours.gguf"),
        ]  # fmt: skip
    else:
        command = [
            str(peer_binaries() / "llama-imatrix"), "-m", str(args.model), "-f", str(args.text), *common,
            "-c", str(WINDOW), "--chunks", str(args.windows), "-o", str(folder / "theirs.gguf"),
        ]  # fmt: skip
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def ours(args: argparse.Namespace) -> None:
    """Write what llama-imatrix would."""
    with Model.open(args.model, vocab_only=True) as model:
        tokens = model.tokenize(args.text.read_text("utf-8"))
    windows = [tokens[start : start + WINDOW] for start in range(0, args.windows * WINDOW, WINDOW)]
    collect(args.model, windows, dataset=args.text.name, n_threads=args.threads).write(args.ours)


if __name__ == "__main__":
    sys.exit(main())
