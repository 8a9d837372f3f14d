"""Start lq and llama-server as users do, on loopback, each in a process of its own; stop only these."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.peer import peer_binaries

START_S = 120.0
STOP_S = 30.0


class NotStarted(RuntimeError):
    """A server ended, or answered nothing, before it was healthy; tells the end of its log."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        text = log.read_text("utf-8", "replace")[-3000:].strip()
        words = [Path(command[0]).name, *command[1:]]
        super().__init__(f"{' '.join(words)} did not start:\n{text}")


@dataclass(frozen=True, slots=True)
class Server:
    """A server that runs. `url`: of its OpenAI API, with /v1."""

    port: int
    process: psutil.Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def memory_bytes(self) -> int:
        """Of the process and its children: what they hold alone and their share of what they hold together;
        0 when it has ended."""
        if not self.process.is_running():
            return 0
        total = 0
        for process in [self.process, *self.process.children(recursive=True)]:
            try:
                full = process.memory_full_info()
            except psutil.NoSuchProcess:
                continue
            total += getattr(full, "pss", full.rss)  # Linux tells shares; elsewhere shared pages count twice
        return total


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[Server]:
    """Run a server until the block ends; yields it once /health answers 200."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, command, log)
            yield Server(port, psutil.Process(process.pid))
        finally:
            stop(process)


def stop(process: subprocess.Popen) -> None:
    """Ask it to end; kill it and its children when it does not."""
    started = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in started:
        if child.is_running():
            child.kill()


def wait_until_healthy(url: str, process: subprocess.Popen, command: Sequence[str], log: Path) -> None:
    """Poll until the server is up; raises NotStarted with its log when it ends or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise NotStarted(command, log)


def lq_command(
    model: Path,
    *,
    port: int,
    threads: int,
    n_ctx: int,
    n_parallel: int,
    kv_cells: int | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """`lq serve`; n_ctx counts tokens of a sequence, `kv_cells` of all together, when not their sum."""
    lq = str(Path(sys.executable).with_name("lq"))
    command = [lq, "serve", str(model), "--port", str(port), "--threads", str(threads)]
    command += ["--n-ctx", str(n_ctx), "--n-parallel", str(n_parallel)]
    if kv_cells:
        command += ["--kv-cells", str(kv_cells)]
    return [*command, *options]


def llama_server_command(
    model: Path,
    *,
    port: int,
    threads: int,
    n_ctx: int,
    n_parallel: int,
    kv_cells: int | None = None,
    options: Sequence[str] = (),
) -> list[str]:
    """llama-server with the same budget; its -c counts tokens of all slots together.

    With `kv_cells` all slots draw on one pool, as they do in lq; without, each has n_ctx cells of its own."""
    server = str(peer_binaries() / "llama-server")
    command = [server, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads)]
    cells = ["-c", str(kv_cells), "--kv-unified"] if kv_cells else ["-c", str(n_ctx * n_parallel)]
    return [*command, *cells, "-np", str(n_parallel), "--no-webui", "--metrics", *options]
