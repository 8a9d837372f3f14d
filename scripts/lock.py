"""Resolve pyproject.toml (with the korean and dev extras) into requirements.lock.

One lock serves every platform and Python from 3.11 on. Two things are left to the installer on purpose:
hashes, and the GPU libraries below torch. The same `torch==2.13.0` is a CPU wheel on one index and a CUDA
wheel on another, so a hash or a list of nvidia packages would hold on one of them only.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")


def main() -> None:
    """Write requirements.lock anew."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11"]
    command += ["--no-annotate", "--no-header", "--extra", "korean", "--extra", "dev", "pyproject.toml"]
    resolved = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    kept = [line for line in resolved.splitlines() if line and not line.startswith(LEFT_TO_TORCH)]
    header = "# Written by `make lock`; see scripts/lock.py for what is left out and why.\n"
    Path(ROOT, "requirements.lock").write_text(header + "\n".join(kept) + "\n", "utf-8")


if __name__ == "__main__":
    main()
