"""Resolve pyproject.toml into requirements.lock and requirements-dev.lock (what runs; what tests it).

One pair of locks serves every platform and Python from 3.11 on. Two things are left to the installer on
purpose: hashes, and the GPU libraries below torch. The same `torch==2.13.0` is a CPU wheel on one index and a
CUDA wheel on another, so a hash or a list of nvidia packages would hold on one of them only.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")
HEADER = "# Written by `make lock`; scripts/lock.py says what is left out and why.\n"


def resolve(*options: str) -> str:
    """Pinned requirements, one a line, for the given extras and constraints."""
    uv = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-annotate", "--no-header"]
    command = [*uv, "--universal", "--python-version", "3.11", *options, "pyproject.toml"]
    resolved = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    lines = resolved.splitlines(keepends=True)
    return "".join(line for line in lines if line.strip() and not line.startswith(LEFT_TO_TORCH))


def main() -> None:
    """Write both locks anew; the second keeps every version of the first."""
    runtime = ROOT / "requirements.lock"
    extras = ("--extra", "korean", "--extra", "build")
    runtime.write_text(HEADER + resolve(*extras), "utf-8")
    everything = resolve(*extras, "--extra", "tune", "--extra", "dev", "--constraint", runtime.name)
    Path(ROOT, "requirements-dev.lock").write_text(HEADER + everything, "utf-8")


if __name__ == "__main__":
    main()
