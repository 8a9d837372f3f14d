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


def test_a_key_of_a_server_changes_nothing_without_one(ask):
    arguments = ["Name a colour.", "--max-tokens", "4", "--json"]
    document = json.loads(ask(*arguments, env={"LQ_API_KEY": "a-key-of-some-server"}).stdout)
    assert document["answer"]
    assert document["usage"]["completion_tokens"] <= 4


def test_without_a_server_nothing_but_the_model_is_needed(ask, asset_home, tmp_path):
    (tmp_path / "models").mkdir()
    name = "smollm2-135m-instruct"
    (tmp_path / "models" / name).symlink_to(asset_home / "models" / name)
    config = tmp_path / "lq.toml"
    config.write_text('[embedder]\nmodel = "no-such-embedder"\n')
    env = {"LQ_HOME": str(tmp_path), "PIP_INDEX_URL": "http://127.0.0.1:1/simple"}
    ask("Name a colour.", "--max-tokens", "4", "--config", config, env=env)
    assert [path.name for path in (tmp_path / "models").iterdir()] == [name]


def test_an_assistants_own_limit_holds_and_a_model_gets_one(ask, served, config):
    question = ["Count from one to one hundred in words.", "--json"]
    here = ["--config", config, "--model", "terse"]
    there = ["--server", served.url, "--model", "terse"]
    for where, env in [(here, {}), (there, {"LQ_API_KEY": served.key})]:
        usage = json.loads(ask(*question, *where, env=env).stdout)["usage"]
        assert usage["completion_tokens"] <= 12
        usage = json.loads(ask(*question, *where, "--max-tokens", "3", env=env).stdout)["usage"]
        assert usage["completion_tokens"] <= 3


def test_with_a_server_it_asks_the_server(ask, served):
    proxy = "http://127.0.0.1:1"  # nobody listens there, and nobody needs it on the way to this machine
    env = {"LQ_API_KEY": served.key, "HTTP_PROXY": proxy, "http_proxy": proxy}
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
