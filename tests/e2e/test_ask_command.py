"""`lq ask`, with a server and without one."""

import json

import pytest


@pytest.fixture
def ask(run_lq):
    """A function that runs `lq ask`."""
    return lambda *arguments, **options: run_lq("ask", *arguments, **options)


def test_without_a_server_it_answers_with_sources(ask):
    fields = [
        "What is the red boat called?",
        "--collection",
        "house",
        "--temperature",
        "0",
        "--max-tokens",
        "24",
    ]
    text = ask(*fields).stdout
    assert "Heron" in text
    assert "\n[1] boats.md, Boats (characters " in text


def test_with_a_server_it_asks_the_server(ask, served):
    env = {"LQ_API_KEY": served.key}
    asked = ["Name a colour.", "--server", served.url, "--model", "terse"]
    text = ask(*asked, env=env).stdout.strip()
    assert text
    question = ["What is the red boat called?", "--server", served.url, "--model", "porter", "--json"]
    document = json.loads(ask(*question, env=env).stdout)
    assert "Heron" in document["answer"]
    assert document["sources"][0]["file"].endswith("boats.md")
    assert "key" in ask(*asked, code=1).stderr
    assert "did you mean 'terse'" in ask(*asked[:-1], "ters", env=env, code=1).stderr


def test_what_cannot_be_asked_is_said_in_one_line(ask):
    for arguments, words in [
        (["?", "--server", "http://127.0.0.1:1"], "no server answers"),
        (["?", "--collection", "nope"], "no collection 'nope'"),
        (["?", "--model", "nope"], "nope"),
        (["?", "--prompt", "gronded"], "did you mean 'grounded'"),
    ]:
        stderr = ask(*arguments, code=1).stderr
        assert words in stderr
        assert len(stderr.strip().splitlines()) == 1
