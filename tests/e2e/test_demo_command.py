"""`lq demo`: the one answer is checked, whatever fails ends it, and no proxy comes between."""

import json
import os
import signal
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from lq.commands import demo
from lq.commands.demo import DemoFailed, Question

QUESTION = Question("What is the mascot called?", "Bosun", "welcome.md")
URL = "http://127.0.0.1:1"


def completion(content="It is called bosun.", files=("pay.md", "welcome.md")):
    sources = [
        {"index": n, "file": file, "page": None, "heading": "", "start": 0, "end": 9}
        for n, file in enumerate(files, start=1)
    ]
    return {
        "choices": [{"message": {"content": content, "sources": sources}}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 5},
        "seconds": 0.1,
    }


@pytest.fixture
def go_on(monkeypatch):
    """A function: what `ask` gives or raises, `once` -> (errors, signals sent to this process)."""

    def run(answer, *, once: bool):
        def ask(_url, _question):
            if isinstance(answer, Exception):
                raise answer
            return answer

        outcome: list[Exception] = []
        sent: list[tuple[int, int]] = []
        monkeypatch.setattr(demo, "ask", ask)
        monkeypatch.setattr("lq.commands.demo.os.kill", lambda *what: sent.append(what))
        demo.answer_and_go_on(URL, QUESTION, once, outcome)
        return outcome, sent

    return run


STOPPED = [(os.getpid(), signal.SIGTERM)]


def test_a_right_answer_is_shown_and_ends_the_demo_when_asked_once(go_on, capsys):
    assert go_on(completion(), once=True) == ([], STOPPED)
    text = capsys.readouterr().out
    order = ["question  What is", "reading the passages", "answer    It is", "source    [2] welcome.md"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)
    assert "curl" not in text


def test_without_once_it_goes_on_and_says_how(go_on, capsys):
    assert go_on(completion("something else"), once=False) == ([], [])
    assert f"curl {URL}/v1/chat/completions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (completion("I do not know."), "'Bosun'"),
        (completion(files=("pay.md",)), "welcome.md is not among the sources: pay.md"),
        (completion(files=()), "there are none"),
    ],
)
def test_a_wrong_answer_fails_the_demo_that_runs_once(go_on, answer, words):
    (error,), sent = go_on(answer, once=True)
    assert isinstance(error, DemoFailed)
    assert words in str(error)
    assert sent == STOPPED


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("error", [DemoFailed("500"), KeyError("choices"), httpx.ReadTimeout("late")])
def test_whatever_fails_ends_the_serving_and_is_handed_over(go_on, error, once):
    assert go_on(error, once=once) == ([error], STOPPED)


def test_an_answer_of_another_shape_ends_the_serving_too(go_on):
    (error,), sent = go_on({"choices": []}, once=True)
    assert isinstance(error, IndexError)
    assert sent == STOPPED


class Answering(BaseHTTPRequestHandler):
    """Answers every request, and remembers it."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.asked.append((self.path, self.headers.get("authorization"), json.loads(body)))
        reply = json.dumps(completion()).encode()
        self.send_response(self.server.status)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as one:
        one.asked, one.status = [], 200  # type: ignore[attr-defined]
        thread = threading.Thread(target=one.serve_forever)
        thread.start()
        yield one
        one.shutdown()
        thread.join()


def test_the_server_is_asked_past_any_proxy_and_with_the_key(server, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", URL)
    monkeypatch.setenv("http_proxy", URL)
    monkeypatch.setenv("LQ_API_KEY", "secret-key")
    url = f"http://127.0.0.1:{server.server_port}"
    assert demo.ask(url, "Mascot?")["seconds"] >= 0
    ((path, authorization, body),) = server.asked
    assert (path, authorization) == ("/v1/chat/completions", "Bearer secret-key")
    assert (body["collection"], body["messages"][0]["content"]) == (demo.COLLECTION, "Mascot?")
    server.status = 503
    with pytest.raises(DemoFailed, match="503"):
        demo.ask(url, "Mascot?")


def test_a_server_that_does_not_answer_is_told_in_one_line():
    with pytest.raises(DemoFailed, match="no answer came"):
        demo.ask(URL, "Mascot?")


def test_the_examples_are_found_in_a_checkout_or_below_the_environment(monkeypatch, tmp_path):
    assert (demo.example_folder() / "handbook").is_dir()
    question = demo.demo_question(demo.example_folder())
    assert (demo.example_folder() / "handbook" / question.file).is_file()
    installed = tmp_path / "share"
    monkeypatch.setattr(demo, "EXAMPLES", (tmp_path / "none", installed))
    with pytest.raises(DemoFailed, match="share"):
        demo.example_folder()
    (installed / "handbook").mkdir(parents=True)
    assert demo.example_folder() == installed
