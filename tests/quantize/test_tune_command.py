"""`lq tune` as people and scripts meet it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from lq.main import main
from models.store import Store

CHAT = {"messages": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture
def lq(monkeypatch, tmp_path, capsys):
    """A function: arguments of `lq tune` -> (exit code, stdout, stderr)."""
    monkeypatch.setenv("LQ_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lq", "tune", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def model(checkpoint) -> Path:
    """The tiny Llama with a chat template."""
    template = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + '</s>' }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template, "utf-8")
    return checkpoint


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "chats.jsonl"
    other = {"messages": [*CHAT["messages"], *CHAT["messages"]]}
    path.write_text("\n".join(map(json.dumps, (CHAT, other))), "utf-8")
    return path


def error(run: tuple[int, str, str]) -> str:
    """The one line of a run that ended as expected errors do."""
    code, _, said = run
    assert code == 1, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    return lines[0]


def test_an_adapter_is_made_measured_and_in_the_store_for_the_server(lq, model, data, tmp_path):
    out = tmp_path / "out" / "greeter"
    code, printed, said = lq(
        model, "--data", data, "--out", out, "--rank", 2, "--epochs", 2, "--held-out", 0.5
    )
    assert code == 0, said
    assert "loss before, nats a token" in printed
    assert f"report: {out / 'report.md'}" in printed
    assert "serve it: lq serve GGUF-OF-checkpoint --lora greeter" in printed
    assert "step 2 of 2: loss" in said
    store = Store(tmp_path / "home")
    assert (store.resolve_adapter("greeter") / "adapter_model.safetensors").is_file()
    assert store.get("greeter").kind == "adapter"
    assert store.resolve_adapter(str(out / "adapter.gguf")).is_file()


def test_a_name_that_holds_something_else_is_refused_before_the_work(lq, model, data, tmp_path):
    Store(tmp_path / "home").add(model, name="taken")
    said = error(lq(model, "--data", data, "--out", tmp_path / "out", "--name", "taken"))
    assert "already holds 'taken'" in said
    assert not (tmp_path / "out").exists()


def test_a_name_that_cannot_be_one_is_refused(lq, model, data, tmp_path):
    assert "'no name'" in error(lq(model, "--data", data, "--out", tmp_path / "no name"))


def test_without_peft_one_line_says_what_to_install(lq, model, data, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "peft" else find(name, *a)
    )
    said = error(lq(model, "--data", data, "--out", tmp_path / "out"))
    assert "needs the package peft" in said
    assert "-m pip install 'peft>=0.18'" in said


def test_a_model_without_a_template_is_refused_with_the_remedy(lq, checkpoint, data, tmp_path):
    said = error(lq(checkpoint, "--data", data, "--out", tmp_path / "out"))
    assert "has no chat template" in said
    assert "chat_template.jinja" in said
    assert not (tmp_path / "out").exists()


def test_a_gguf_is_sent_back_for_its_checkpoint(lq, data, tmp_path, smollm2_gguf):
    said = error(lq(smollm2_gguf, "--data", data, "--out", tmp_path / "out"))
    assert "this is a GGUF, and tuning needs the checkpoint" in said


def test_a_bad_line_is_named(lq, model, data, tmp_path):
    data.write_text(data.read_text("utf-8") + "\n{}\n", "utf-8")
    assert f"{data}, line 3: messages is missing" in error(
        lq(model, "--data", data, "--out", tmp_path / "out")
    )


def test_both_ways_to_cut_the_rank_at_once_are_refused(lq, model, data, tmp_path):
    both = ("--final-rank", 2, "--energy", 0.9)
    said = error(lq(model, "--data", data, "--out", tmp_path / "out", *both))
    assert "--final-rank and --energy" in said
    said = error(lq(model, "--data", data, "--out", tmp_path / "out", "--rank", 2, "--final-rank", 3))
    assert "--final-rank is 3 and --rank 2; give 1 to 2" in said


def test_the_example_of_chats_is_one_that_can_be_learnt_from():
    from quantize.tuning.chats import read_chats

    chats = read_chats(Path(__file__).parents[2] / "examples" / "lighthouse.jsonl")
    assert len(chats) == 40
    assert all(chat.messages[-1].content.startswith("Ahoy, friend! ") for chat in chats)


def test_help_names_every_option(lq):
    code, text, _ = lq("--help")
    assert code == 0
    for option in (
        "--data",
        "--out",
        "--qlora",
        "--rank",
        "--final-rank",
        "--energy",
        "--held-out",
        "--seed",
    ):
        assert option in text, option
