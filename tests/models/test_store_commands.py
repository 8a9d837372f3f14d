"""`lq pull | list | show | rm`: what scripts and people read."""

import json

import gguf
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from lq.commands import store as commands
from models.errors import ModelsError
from models.gguf import InvalidGGUF
from models.store import Store, UnknownModel


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LQ_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def run(*words: str, ok: bool = True, **options):
    """Run the command; its own errors are raised as `lq` would print them."""
    app = typer.Typer()
    commands.register(app)
    result = CliRunner().invoke(app, list(words), **options)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code == 0) == ok, result.output
    return result.stdout


@pytest.fixture
def model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_context_length(512)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    packed = gguf.quants.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_up.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf"


def test_a_model_is_pulled_listed_shown_and_removed(home, model):
    assert f"in {home}/models/mine" in run("pull", str(model), "--name", "mine")
    assert run("list").split("\t")[:2] == ["mine", "gguf"]
    shown = run("show", "mine")
    for fact in ("llama", "Q8_0", "512 tokens", "bits per weight", "chat template         yes"):
        assert fact in shown
    assert run("rm", "mine", "--yes") == "removed mine\n"
    assert run("list") == ""
    with pytest.raises(UnknownModel):
        run("show", "mine")


def test_json_is_one_document_on_stdout(home, model):
    pulled = json.loads(run("pull", str(model), "--json"))
    assert (pulled["name"], pulled["kind"], pulled["source"]) == ("tiny", "gguf", f"file:{model}")
    listed = json.loads(run("list", "--json"))
    assert listed["home"] == str(home)
    assert [row["name"] for row in listed["models"]] == ["tiny"]
    assert "catalog" not in listed
    shown = json.loads(run("show", "tiny", "--json"))
    assert shown["types"] == {
        "F32": {"tensors": 1, "size_bytes": 512},
        "Q8_0": {"tensors": 1, "size_bytes": 272},
    }
    assert (shown["parameters"], shown["bits_per_weight"]) == (384, round(8 * 784 / 384, 3))
    assert len(shown["files"][0]["sha256"]) == 64
    assert json.loads(run("rm", "tiny", "--json")) == {"removed": "tiny"}


@pytest.mark.usefixtures("home")
def test_the_catalogue_is_listed_on_demand():
    assert "qwen2.5-coder-1.5b-instruct" not in run("list")
    assert "qwen2.5-coder-1.5b-instruct\tgguf\t1,117.0 MB\tapache-2.0" in run("list", "--catalog")
    document = json.loads(run("list", "--catalog", "--json"))
    assert {"name", "kind", "size_bytes", "licence", "description", "source"} == document["catalog"][0].keys()


@pytest.mark.usefixtures("home")
def test_a_file_outside_the_store_can_be_shown(model):
    assert json.loads(run("show", str(model), "--json"))["architecture"] == "llama"
    model.write_bytes(model.read_bytes()[:300])
    with pytest.raises(InvalidGGUF):
        run("show", str(model))


def test_an_embedder_and_an_adapter_are_described(home, minilm_dir, tmp_path):
    from safetensors.numpy import save_file

    Store(home).add(minilm_dir, name="minilm")
    shown = json.loads(run("show", "minilm", "--json"))
    assert (shown["kind"], shown["parameters"], shown["embedding_width"]) == ("embedder", 22713728, 384)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.mlp.up_proj"
    factors = {"A": np.zeros((2, 8), np.float32), "B": np.zeros((8, 2), np.float32)}
    save_file(
        {f"{name}.lora_{k}.weight": v for k, v in factors.items()}, adapter / "adapter_model.safetensors"
    )
    run("pull", str(adapter))
    shown = json.loads(run("show", "adapter", "--json"))
    assert (shown["kind"], shown["base_model"], shown["modules"]) == ("adapter", "org/base", 1)


@pytest.mark.usefixtures("home")
def test_a_refused_pull_leaves_nothing_to_go_on_from(tmp_path):
    (tmp_path / "fake.gguf").write_bytes(b"no model at all")
    for reference in (tmp_path / "nothing-here", tmp_path / "fake.gguf"):
        with pytest.raises(ModelsError):
            run("pull", str(reference))
    assert json.loads(run("list", "--json"))["interrupted"] == []


def test_interrupted_and_broken_entries_are_reported(home):
    (home / "tmp" / "pulls" / "half").mkdir(parents=True)
    (home / "tmp" / "pulls" / "half" / "part").write_bytes(b"x" * 1_000_000)
    (home / "models" / "bad").mkdir(parents=True)
    listed = run("list")
    assert "interrupted: half, 1.0 MB kept" in listed
    assert "broken: " in listed
    document = json.loads(run("list", "--json"))
    assert document["interrupted"] == [{"name": "half", "size_bytes": 1_000_000}]
    assert document["broken"][0]["name"] == "bad"
    run("rm", "half")
    run("rm", "bad")


def test_removal_is_confirmed_on_a_terminal(home, model, monkeypatch):
    run("pull", str(model))
    monkeypatch.setattr(commands, "on_terminal", lambda: True)
    run("rm", "tiny", input="n\n", ok=False)
    assert (home / "models" / "tiny").is_dir()
    run("rm", "tiny", input="y\n")
    assert not (home / "models" / "tiny").exists()


def test_help_names_units_and_defaults():
    for command in ("pull", "list", "show", "rm"):
        assert "--json" in run(command, "--help", env={"COLUMNS": "120"})
