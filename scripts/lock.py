"""Resolve pyproject.toml into requirements.lock (what runs) and requirements-dev.lock (that and what tests it).

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
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--no-annotate", "--no-header", *options, "pyproject.toml"]
    resolved = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    return "\n".join(line for line in resolved.splitlines() if line and not line.startswith(LEFT_TO_TORCH)) + "\n"


def main() -> None:
    """Write both locks anew; the second keeps every version of the first."""
    runtime = ROOT / "requirements.lock"
    runtime.write_text(HEADER + resolve("--extra", "korean", "--extra", "build"), "utf-8")
    everything = resolve("--extra", "korean", "--extra", "build", "--extra", "dev", "--constraint", runtime.name)
    Path(ROOT, "requirements-dev.lock").write_text(HEADER + everything, "utf-8")


if __name__ == "__main__":
    main()
