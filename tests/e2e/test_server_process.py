"""The server as a process: clients that leave, engines that die, bodies too large, failed starts, stops."""

import json
import signal
import socket

import httpx
import psutil
import pytest

LONG = {
    "model": "smol",
    "messages": [{"role": "user", "content": "Count from one to one thousand."}],
    "max_tokens": 1500,
    "ignore_eos": True,
}


@pytest.fixture
def start_failing(run_lq):
    """A function that gives the one line that `lq serve` ends with."""

    def start(*arguments: str) -> str:
        result = run_lq("serve", "--port", "0", *arguments, code=1)
        assert result.stdout == ""
        lines = result.stderr.strip().splitlines()
        assert len(lines) == 1, result.stderr
        assert lines[0].startswith("error: ")
        return lines[0]

    return start


def test_a_client_that_leaves_frees_its_sequence(served, until):
    before = served.metric("lq_engine_cancelled_total")
    with (
        served.http() as client,
        client.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as got,
    ):
        lines = got.iter_lines()
        while '"content":"' not in next(lines):
            pass
        assert served.metric("lq_engine_running") == 1
    until(lambda: served.metric("lq_engine_running") == 0)
    assert served.metric("lq_engine_cancelled_total") == before + 1


def test_a_client_that_leaves_without_streaming_frees_its_sequence(served, until):
    before = served.metric("lq_engine_cancelled_total")
    with served.http() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=LONG, timeout=1)
    until(lambda: served.metric("lq_engine_running") == 0)
    assert served.metric("lq_engine_cancelled_total") == before + 1


def test_an_engine_that_is_killed_costs_its_requests_and_nothing_else(served, client):
    engine = served.engine()
    restarts = served.metric("lq_engine_restarts_total")
    with (
        served.http() as http,
        http.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as got,
    ):
        lines = got.iter_lines()
        while '"content":"' not in next(lines):
            pass
        engine.send_signal(signal.SIGKILL)
        last = [line for line in lines if line.startswith("data: ")][-1]
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("engine_restarted", "server_error")
    asked = {"model": "smol", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    assert client.chat.completions.create(**asked, timeout=10).choices[0].finish_reason
    assert served.metric("lq_engine_restarts_total") == restarts + 1
    assert served.engine().pid != engine.pid
    assert served.process.poll() is None


def test_a_body_of_a_hundred_megabytes_is_refused_without_being_kept(served):
    before = psutil.Process(served.process.pid).memory_info().rss

    def body():
        for _ in range(100):
            yield b"x" * 2**20

    with served.http() as client:
        headers = {"content-type": "application/json"}
        for content in (body(), b"x" * (100 * 2**20)):
            response = client.post("/v1/chat/completions", content=content, headers=headers)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
    assert psutil.Process(served.process.pid).memory_info().rss < before + 50 * 2**20


def test_without_a_key_nothing_is_served(served):
    for headers in ({}, {"authorization": "Bearer wrong-key"}):
        response = httpx.get(f"{served.url}/v1/models", headers=headers)
        assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{served.url}/health").json() == {"status": "ok"}


def test_logs_hold_no_text_of_users(served, client, until):
    client.chat.completions.create(
        model="smol", messages=[{"role": "user", "content": "xylophone secret"}], max_tokens=2
    )
    with served.http() as http:
        http.post("/v1/chat/completions", json={"model": "smol", "messages": "xylophone secret"})
        request_id = http.get("/health").headers["x-request-id"]
    until(lambda: any(request_id in line for line in served.lines))
    assert "xylophone" not in "".join(served.lines)


def test_sigterm_drains_and_takes_the_engine_along(serve_lq):
    with serve_lq("--n-ctx", "512", "--threads", "1") as server:
        engine = server.engine()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
    assert not [line for line in server.lines if "Traceback" in line]


def test_ctrl_c_exits_130_and_a_killed_server_leaves_no_engine(serve_lq, smollm2_gguf, until):
    with serve_lq(str(smollm2_gguf), "--n-ctx", "512", "--threads", "1") as server:
        assert "smollm2" in server.lines[0].lower()
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) == 130
    with serve_lq("--n-ctx", "512", "--threads", "1") as server:
        engine = server.engine()
        server.process.kill()
        until(lambda: not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE)


def test_starts_that_cannot_work_end_with_one_clear_line(start_failing, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is in use" in start_failing("--port", port)
    junk = tmp_path / "junk.gguf"
    junk.write_bytes(b"GGUF" + b"\xff" * 100)
    assert "junk.gguf" in start_failing(str(junk))
    assert "smollm2-135m-instruct" in start_failing("smollm2-135m-instrukt")
    assert "LQ_API_KEY" in start_failing("--host", "0.0.0.0")
    bad = tmp_path / "lq.toml"
    bad.write_text("[server]\nprot = 1\n")
    assert "did you mean `port`" in start_failing("--config", str(bad))
    bad.write_text('[embedder]\nmodel = "nope"\n')
    assert "embedder.model: no model named 'nope'" in start_failing("--config", str(bad))
    bad.write_text('[server]\nallowed_hosts = ["lq.example:8000"]\n')
    assert "server.allowed_hosts: 'lq.example:8000'" in start_failing("--config", str(bad))
    bad.write_text('[assistants.a]\nmodel = "smollm2-135m-instruct"\ncollection = "nope"\n')
    assert "no collection 'nope'" in start_failing("--config", str(bad))
