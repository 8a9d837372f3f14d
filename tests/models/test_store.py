"""The store: names to files, additions all there or not at all, also with two processes at once."""

import errno
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from models import staging
from models.gguf import InvalidGGUF
from models.kinds import NotAModel
from models.reference import InvalidName, InvalidReference
from models.source import DiskFull, FetchFailed
from models.store import NameTaken, Store, UnknownModel, WrongKind
from models.tensors import InvalidSafetensors

ROOT = Path(__file__).parents[2]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def write_gguf(path, kind: str = "model", **extra: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(kind)
    for key, value in extra.items():
        writer.add_string(f"general.{key}", value)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_checkpoint(folder, *, embedder: bool = False, card: str = ""):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "hidden_size": 8}')
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    (folder / "README.md").write_text(card)
    if embedder:
        (folder / "modules.json").write_text("[]")
    return folder


def test_a_local_gguf_is_copied_and_described(store, tmp_path):
    original = write_gguf(tmp_path / "tiny.gguf", license="mit")
    entry = store.pull(str(original))
    assert (entry.name, entry.kind, entry.manifest.licence) == ("tiny", "gguf", "mit")
    assert entry.manifest.source == f"file:{original}"
    assert store.resolve_model("tiny") == entry.file
    original.write_bytes(b"edited later")
    assert store.resolve_model("tiny").read_bytes() != b"edited later"


@pytest.mark.parametrize("embedder", [False, True])
def test_a_local_folder_is_recognised(store, tmp_path, embedder):
    folder = write_checkpoint(tmp_path / "m", embedder=embedder, card="---\nlicense: apache-2.0\n---\nhello")
    (folder / "training.py").write_text("raise SystemExit")
    (folder / "optimizer.pt").write_bytes(b"pickle")
    entry = store.pull(f"file:{folder}", name="mine")
    assert (entry.kind, entry.manifest.licence) == ("embedder" if embedder else "checkpoint", "apache-2.0")
    assert "training.py" not in {file.path for file in entry.manifest.files}
    resolve = store.resolve_embedder if embedder else store.resolve_checkpoint
    assert resolve("mine") == entry.path
    assert resolve(str(folder)) == folder


def test_an_entry_of_another_kind_is_refused_by_its_kind(store, tmp_path):
    write_checkpoint(tmp_path / "m", embedder=True)
    store.pull(str(tmp_path / "m"))
    with pytest.raises(WrongKind, match="m is of kind embedder, a gguf is needed"):
        store.resolve_model("m")


def test_a_gguf_adapter_resolves_to_its_file(store, tmp_path):
    path = write_gguf(tmp_path / "lora.gguf", kind="adapter")
    entry = store.pull(str(path))
    assert entry.kind == "adapter"
    assert store.resolve_adapter("lora") == entry.file
    assert store.resolve_adapter(str(path)) == path
    with pytest.raises(WrongKind, match="of kind adapter"):
        store.resolve_model(str(path))


def test_pieces_of_a_split_model_stay_together(store, tmp_path):
    for number in (1, 2):
        writer = gguf.GGUFWriter(tmp_path / f"split/m-0000{number}-of-00002.gguf", "llama")
        (tmp_path / "split").mkdir(exist_ok=True)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"t{number}", np.zeros(32, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    entry = store.pull(str(tmp_path / "split"))
    assert len(entry.manifest.files) == 2
    assert entry.file.name == "m-00001-of-00002.gguf"


def test_a_checkpoint_with_a_gguf_beside_it_stays_a_checkpoint(store, tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    write_gguf(folder / "m-Q8_0.gguf")
    assert store.resolve_checkpoint(str(folder)) == folder
    entry = store.pull(str(folder))
    assert entry.kind == "checkpoint"
    assert not list(entry.path.glob("*.gguf"))


def test_two_unrelated_ggufs_in_a_folder_are_refused(store, tmp_path):
    write_gguf(tmp_path / "f/a.gguf")
    write_gguf(tmp_path / "f/b.gguf")
    with pytest.raises(NotAModel, match="not the pieces of one model"):
        store.pull(str(tmp_path / "f"))


def test_entries_are_listed_by_name_and_removed(store, tmp_path):
    for name in ("b", "a"):
        store.add(write_gguf(tmp_path / "x.gguf"), name=name, source="made here", licence="mit")
    assert [entry.name for entry in store.entries()] == ["a", "b"]
    assert store.get("a").manifest.source == "made here"
    store.remove("a")
    assert [entry.name for entry in store.entries()] == ["b"]
    with pytest.raises(UnknownModel, match="no model named 'a'"):
        store.remove("a")


def test_an_unknown_name_is_answered_with_what_may_be_meant(store, tmp_path):
    store.add(write_gguf(tmp_path / "x.gguf"), name="my-model")
    with pytest.raises(UnknownModel, match="did you mean my-model"):
        store.resolve_model("my-modle")
    with pytest.raises(UnknownModel, match="`lq pull smollm2-135m-instruct` fetches it"):
        store.resolve_model("smollm2-135m-instruct")
    with pytest.raises(UnknownModel, match="`lq pull qwen3-8b` would fetch the closest"):
        store.get("qwen3-8")
    with pytest.raises(InvalidReference, match="did you mean smollm2-135m-instruct"):
        store.pull("smollm2-135m-instrct")
    with pytest.raises(NotAModel, match="no such file or folder"):
        store.resolve_model("./nowhere.gguf")


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "", ".."])
def test_names_outside_the_store_are_refused(store, tmp_path, name):
    victim = tmp_path / "home" / "x"
    victim.mkdir(parents=True)
    for act in (store.remove, store.get, lambda name: store.pull(str(tmp_path), name=name)):
        with pytest.raises((InvalidName, NotAModel, FetchFailed)):
            act(name)
    assert victim.is_dir()


def test_a_taken_name_is_refused_and_the_same_source_is_not_copied_again(store, tmp_path):
    first = store.pull(str(write_gguf(tmp_path / "a/m.gguf")))
    assert store.pull(str(tmp_path / "a/m.gguf")) == first
    with pytest.raises(NameTaken, match=r"already holds 'm'.*--name"):
        store.pull(str(write_gguf(tmp_path / "b/m.gguf")))


@pytest.mark.parametrize("moment", ["copying", "hashing"])
def test_an_interrupted_addition_leaves_nothing_visible_and_can_be_repeated(store, tmp_path, moment):
    folder = write_checkpoint(tmp_path / "m")

    def interrupt(what, _done, _total):
        if what.startswith(moment):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.pull(str(folder), progress=interrupt)
    assert store.entries() == []
    assert [name for name, _ in store.partial()] == ["m"]
    assert store.pull(str(folder)).kind == "checkpoint"
    assert store.partial() == []


def test_what_another_source_left_behind_is_not_mixed_in(store, tmp_path):
    stage = staging.Stage(store.pulls / "m")
    stage.prepare("hf:someone/else")
    (stage.content / "tokenizer.json").write_text("{}")
    entry = store.pull(str(write_checkpoint(tmp_path / "m")))
    assert "tokenizer.json" not in {file.path for file in entry.manifest.files}


def test_an_interrupted_pull_can_be_removed(store):
    staging.Stage(store.pulls / "m").prepare("hf:someone/else")
    store.remove("m")
    assert store.partial() == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_clear_error_and_loses_nothing(store, tmp_path, monkeypatch, code):
    folder = write_checkpoint(tmp_path / "m")
    store.add(write_gguf(tmp_path / "x.gguf"), name="other")

    def full(*_args, **_kwargs):
        raise OSError(code, "no space")

    monkeypatch.setattr("models.sources.local.shutil.copystat", full)
    with pytest.raises(DiskFull, match=r"is full; free some space and run the same command again.*LQ_HOME"):
        store.pull(str(folder))
    monkeypatch.undo()
    assert [entry.name for entry in store.entries()] == ["other"]
    assert store.pull(str(folder)).kind == "checkpoint"


@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_FSIZE")
def test_a_write_past_the_file_size_limit_leaves_nothing_visible(store, tmp_path):
    big = tmp_path / "big.gguf"
    write_gguf(big)
    with big.open("ab") as file:
        file.truncate(1 << 20)
    script = f"""
        import resource, signal, sys
        from models.store import Store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
        try:
            Store({str(store.root)!r}).pull({str(big)!r})
        except OSError as error:
            print(error)
            sys.exit(3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, check=False)
    assert done.returncode == 3
    assert store.entries() == []


def test_two_processes_that_pull_the_same_thing_do_no_harm(store, tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    script = f"""
        import time
        from models.store import Store
        def slow(what, done, total):
            time.sleep(0.05)
        entry = Store({str(store.root)!r}).pull({str(folder)!r}, progress=slow)
        print(entry.manifest.added_at, entry.path)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    printed = {process.communicate(timeout=60)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(printed) == 1
    assert [entry.name for entry in store.entries()] == ["m"]
    assert store.partial() == []


def test_a_process_killed_while_it_pulls_leaves_no_lock_behind(store, tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    script = f"""
        import time
        from models.store import Store
        def stuck(what, done, total):
            print("busy", flush=True)
            time.sleep(60)
        Store({str(store.root)!r}).pull({str(folder)!r}, progress=stuck)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "busy\n"
    process.kill()
    process.communicate()
    assert store.entries() == []
    assert store.pull(str(folder)).kind == "checkpoint"


def test_a_broken_manifest_hides_no_other_entry(store, tmp_path):
    store.add(write_gguf(tmp_path / "x.gguf"), name="good")
    (store.models / "bad").mkdir()
    (store.models / "worse").mkdir()
    (store.models / "worse" / "manifest.json").write_text('{"name": 3}')
    assert [entry.name for entry in store.entries()] == ["good"]
    assert [name for name, _ in store.broken()] == ["bad", "worse"]
    store.remove("bad")


def test_the_store_lies_where_lq_home_says(monkeypatch, tmp_path):
    monkeypatch.setenv("LQ_HOME", str(tmp_path / "elsewhere"))
    assert Store.default().root == tmp_path / "elsewhere"
    monkeypatch.delenv("LQ_HOME")
    assert Store.default().root.name == "lq"


def test_bad_files_are_refused_each_with_its_reason(store, tmp_path):
    whole = write_checkpoint(tmp_path / "whole")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + b"\xff" * 200)
    (tmp_path / "weights.bin").write_bytes(b"pickle")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    pickles = tmp_path / "pickles"
    pickles.mkdir()
    (pickles / "pytorch_model.bin").write_bytes(b"pickle")
    cut = shutil.copytree(whole, tmp_path / "cut")
    (cut / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:-4])
    shardless = shutil.copytree(whole, tmp_path / "shardless")
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    (shardless / "model.safetensors.index.json").write_text(json.dumps(index))
    nojson = shutil.copytree(whole, tmp_path / "nojson")
    (nojson / "config.json").write_text("{")
    expected = {
        "junk.gguf": (InvalidGGUF, "version"),
        "weights.bin": (NotAModel, "pickles"),
        "notes.txt": (FetchFailed, r"must be a \.gguf"),
        "empty": (FetchFailed, "holds no model files"),
        "pickles": (NotAModel, r"pickles \(pytorch_model\.bin\)"),
        "cut": (InvalidSafetensors, "truncated: tensor 'a' ends at byte"),
        "shardless": (NotAModel, r"shard model-00002\.safetensors is missing"),
        "nojson": (NotAModel, "not valid JSON"),
        "missing": (FetchFailed, "no such file or folder"),
    }
    for name, (error, message) in expected.items():
        with pytest.raises(error, match=message):
            store.pull(str(tmp_path / name), name="x")
        assert store.entries() == []


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff" * 8,
        (10**9).to_bytes(8, "little"),
        (4).to_bytes(8, "little") + b"nope",
        (2).to_bytes(8, "little") + b"[]",
        (63).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}         ',
        (63).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}        ',
        (63).to_bytes(8, "little") + b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}         ',
        (63).to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}         ',
    ],
)
def test_a_broken_safetensors_header_is_refused(tmp_path, store, header):
    folder = write_checkpoint(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(InvalidSafetensors):
        store.pull(str(folder))
