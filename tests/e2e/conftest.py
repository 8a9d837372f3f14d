"""One real `lq serve` for the session: the real model, a collection of real documents, a key."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest

LQ = Path(sys.executable).with_name("lq")
ROOT = Path(__file__).parents[2]
KEY = "test-key-of-the-session"
START_S = 120

CONFIG = """
[models.smol]
model = "smollm2-135m-instruct"
n_ctx = 2048
n_parallel = 4
threads = 2

[assistants.terse]
model = "smol"
temperature = 0.0
max_tokens = 12

[assistants.porter]
model = "smol"
collection = "house"
passages = 3
temperature = 0.0
max_tokens = 40
"""

DOCUMENTS = {
    "keys.md": "# Keys\n\nThe spare key of the boat house hangs behind the blue clock in the hall.\n",
    "boats.md": "# Boats\n\nThe red boat is called Heron and carries four people. It is painted every May.\n",
    "garden.txt": "The garden gate is locked at nine in the evening. Apples are picked in September.\n",
}


@dataclass
class Served:
    """A running server."""

    process: subprocess.Popen
    url: str
    key: str = KEY
    lines: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {KEY}"}

    def http(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=60, **options)

    def engine(self) -> psutil.Process:
        """The child that holds the model."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        found = [child for child in children if "engine.worker" in " ".join(child.cmdline())]
        assert len(found) == 1
        return found[0]

    def metric(self, name: str) -> float:
        """A figure of the model `smol`."""
        with self.http() as client:
            text = client.get("/metrics").text
        match = re.search(rf'^{name}\{{[^}}]*model="smol"[^}}]*\}} (\S+)$', text, re.MULTILINE)
        assert match, f"{name} is not in /metrics"
        return float(match[1])


def environment(home: Path) -> dict[str, str]:
    return os.environ | {"LQ_HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


@contextlib.contextmanager
def serving(home: Path, *arguments: str, env: dict[str, str] | None = None) -> Iterator[Served]:
    """`lq serve` with these arguments on a free port, until the block ends."""
    process = subprocess.Popen(
        [LQ, "serve", "--port", "0", *arguments],
        env=environment(home) | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    served = Served(process, "")
    ready = threading.Event()

    def read() -> None:
        for line in process.stdout or ():
            served.lines.append(line)
            if match := re.search(r"at (http://\S+)/v1 ", line):
                served.url = match[1]
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(START_S), "the server did not start"
        assert served.url, "".join(served.lines)
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(30)
        reader.join(5)
        if process.stdout:
            process.stdout.close()


@pytest.fixture(scope="session")
def home(asset_home: Path, tmp_path_factory) -> Path:
    """An LQ_HOME with the pulled models and a collection `house`."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "models").symlink_to(asset_home / "models")
    documents = tmp_path_factory.mktemp("documents")
    for name, text in DOCUMENTS.items():
        (documents / name).write_text(text)
    command = [LQ, "index", "house", documents]
    subprocess.run(command, env=environment(folder), check=True, capture_output=True, timeout=START_S)
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "lq.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def served(home: Path, config: Path) -> Iterator[Served]:
    """The server of the session."""
    with serving(home, "--config", str(config), env={"LQ_API_KEY": KEY}) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, timeout=60) as one:
        yield one


@pytest.fixture(scope="session")
def run_lq(home: Path):
    """A function that runs `lq` with the home of the session, checks its exit code, gives what it printed."""

    def run(*arguments: str | Path, env: dict[str, str] | None = None, code: int = 0):
        result = subprocess.run(
            [LQ, *arguments],
            env=environment(home) | (env or {}), capture_output=True, text=True, timeout=START_S, check=False,
        )  # fmt: skip
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return run


@pytest.fixture(scope="session")
def serve_lq(home: Path):
    """A function: arguments of `lq serve` -> context of the running server."""
    return lambda *arguments: serving(home, *arguments)


@pytest.fixture(scope="session")
def until():
    """A function that waits for a condition and gives its first true value."""
    return _until


def _until(condition, *, timeout_s: float = 10.0):
    """The first true value of `condition`; fails when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError("it never became true")
