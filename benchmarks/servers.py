"""Start lq and llama-server as users do, on loopback, each in a process of its own; stop only these."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.peer import peer_binaries

START_S = 120.0


def free_port() -> int:
    """A loopback port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(command: list[str], port: int, log: Path) -> Iterator[str]:
    """Run a server until the block ends; yields its base URL once /health answers 200."""
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=30)


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    """Poll until the server is up; raises RuntimeError with its log when it ends or takes too long."""
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{process.args} did not start:\n{log.read_text('utf-8', 'replace')[-3000:]}")


def lq_command(model: Path, *, port: int, threads: int, n_ctx: int, n_parallel: int) -> list[str]:
    """`lq serve`; n_ctx counts tokens a sequence."""
    lq = str(Path(sys.executable).with_name("lq"))
    command = [lq, "serve", str(model), "--port", str(port), "--threads", str(threads)]
    return [*command, "--n-ctx", str(n_ctx), "--n-parallel", str(n_parallel)]


def llama_server_command(model: Path, *, port: int, threads: int, n_ctx: int, n_parallel: int) -> list[str]:
    """llama-server with the same budget; its -c counts tokens of all slots together."""
    server = str(peer_binaries() / "llama-server")
    command = [server, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-t", str(threads)]
    return [*command, "-c", str(n_ctx * n_parallel), "-np", str(n_parallel), "--no-webui"]
