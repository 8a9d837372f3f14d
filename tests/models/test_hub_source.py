"""Repositories of a hub, fetched by the real huggingface-hub from a small hub on loopback."""

import errno
import hashlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from models.kinds import NotAModel
from models.reference import HubReference
from models.source import DiskFull, FetchFailed
from models.sources import hub
from models.store import Store

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = save({"a": np.arange(4000, dtype=np.float32)})
CHECKPOINT = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": WEIGHTS,
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "pytorch_model.bin": b"a pickle",
    "modeling_custom.py": b"raise SystemExit",
    "onnx/model.safetensors": WEIGHTS,
}


class Hub(ThreadingHTTPServer):
    """Repositories by name; `asked` notes what was fetched, `cut` breaks a download once."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.refusals: dict[str, tuple[int, str]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.cut: int | None = None


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_args):
        """Keep the test's output clean."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0].strip("/")
        repo = "/".join(path.removeprefix("api/models/").split("/")[:2])
        if repo in self.server.refusals:
            status, code = self.server.refusals[repo]
            return self.reply(status, b"{}", {"X-Error-Code": code, "X-Error-Message": "refused"})
        if repo not in self.server.repositories:
            return self.reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path.startswith("api/"):
            return self.describe(repo, path)
        return self.file(repo, path.split("/", 4)[4])

    def describe(self, repo: str, path: str):
        if "/revision/" in path and path.rpartition("/")[2] not in ("main", "v1", COMMIT):
            return self.reply(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.server.repositories[repo]
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        card = {"license": "apache-2.0"}
        body = {"_id": "1", "id": repo, "sha": COMMIT, "siblings": siblings, "cardData": card}
        return self.reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def file(self, repo: str, name: str):
        data = self.server.repositories[repo].get(name)
        if data is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        wanted = self.headers.get("Range")
        if self.command == "GET":
            self.server.asked.append((name, wanted))
        if wanted:
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(206, data[start:], headers)
        return self.reply(200, data, headers)

    def reply(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.server.cut is not None and len(body) > self.server.cut:
            self.wfile.write(body[: self.server.cut])
            self.server.cut = None
            self.close_connection = True
            return
        self.wfile.write(body)


@pytest.fixture
def server(monkeypatch, tmp_path):
    with Hub() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{found.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def test_a_checkpoint_is_stored_without_pickles_code_and_other_runtimes(server, store):
    server.repositories["org/name"] = CHECKPOINT
    reports = []
    entry = store.pull("hf:org/name", progress=lambda *report: reports.append(report))
    assert {file.path for file in entry.manifest.files} == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md",
    }  # fmt: skip
    assert (entry.name, entry.kind) == ("name", "checkpoint")
    assert (entry.manifest.revision, entry.manifest.licence) == (COMMIT, "apache-2.0")
    assert (entry.path / "model.safetensors").read_bytes() == WEIGHTS
    total = sum(file.size_bytes for file in entry.manifest.files)
    assert (reports[-5][1], reports[-5][2]) == (total, total)


def test_what_is_stored_is_not_asked_for_again(server, store):
    server.repositories["org/name"] = CHECKPOINT
    first = store.pull("hf:org/name")
    server.asked.clear()
    server.repositories.clear()
    assert store.pull("hf:org/name") == first
    assert server.asked == []


def test_a_cut_download_goes_on_with_the_missing_bytes(server, store, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.repositories["org/name"] = CHECKPOINT
    server.cut = 10_000
    entry = store.pull("hf:org/name")
    assert (entry.path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [wanted for name, wanted in server.asked if name == "model.safetensors"]
    assert ranges == [None, "bytes=10000-"]


def test_an_interrupted_pull_keeps_the_files_it_has(server, store, monkeypatch):
    server.repositories["org/name"] = CHECKPOINT
    original = hub._download

    def interrupting(reference, commit, name, meter):
        if name == "tokenizer.json":
            raise KeyboardInterrupt
        return original(reference, commit, name, meter)

    monkeypatch.setattr(hub, "_download", interrupting)
    with pytest.raises(KeyboardInterrupt):
        store.pull("hf:org/name")
    assert store.entries() == []
    assert store.partial()[0][0] == "name"
    monkeypatch.setattr(hub, "_download", original)
    store.pull("hf:org/name")
    assert [name for name, _ in server.asked].count("model.safetensors") == 1


def test_a_branch_that_moved_while_a_pull_was_interrupted_leaves_no_file_of_the_old_commit(
    server, store, monkeypatch
):
    server.repositories["org/name"] = CHECKPOINT | {"gone.json": b"{}"}
    original = hub._download

    def interrupting(reference, commit, name, meter):
        if name == "tokenizer.json":
            raise KeyboardInterrupt
        return original(reference, commit, name, meter)

    monkeypatch.setattr(hub, "_download", interrupting)
    with pytest.raises(KeyboardInterrupt):
        store.pull("hf:org/name")
    monkeypatch.setattr(hub, "_download", original)
    moved = "f" * 40
    monkeypatch.setattr(sys.modules[__name__], "COMMIT", moved)
    config = b'{"architectures": ["LlamaForCausalLM"], "hidden_size": 8}'
    server.repositories["org/name"] = CHECKPOINT | {"config.json": config}
    entry = store.pull("hf:org/name")
    assert entry.manifest.revision == moved
    assert (entry.path / "config.json").read_bytes() == config
    assert not (entry.path / "gone.json").exists()


def test_offline_mode_reads_the_cache(server, store, tmp_path, monkeypatch):
    server.repositories["org/name"] = CHECKPOINT
    store.pull("hf:org/name@v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    other = Store(tmp_path / "other").pull(f"hf:org/name@{COMMIT}")
    assert (other.path / "model.safetensors").read_bytes() == WEIGHTS
    assert server.asked == []
    with pytest.raises(FetchFailed, match=r"hf:org/else is not in the local cache .* HF_HUB_OFFLINE is set"):
        store.pull("hf:org/else")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated: accept its licence .* HF_TOKEN"),
        (401, "RepoNotFound", "does not exist, or is private"),
        (404, "RepoNotFound", "does not exist, or is private"),
        (400, "", "the hub answered"),
    ],
)
def test_a_refusal_is_explained_in_one_line(server, store, status, code, message):
    server.refusals["org/name"] = (status, code)
    with pytest.raises(FetchFailed, match=message) as failure:
        store.pull("hf:org/name")
    assert "\n" not in str(failure.value)


def test_a_missing_revision_is_named(server, store):
    server.repositories["org/name"] = CHECKPOINT
    with pytest.raises(FetchFailed, match="has no revision 'v9'"):
        store.pull("hf:org/name@v9")


def test_a_hub_that_nobody_answers_for_is_explained(server, store):
    server.shutdown()
    server.server_close()
    with pytest.raises(FetchFailed, match="no connection to the hub"):
        store.pull("hf:org/name")


def test_a_disk_too_small_is_refused_before_the_first_byte(server, store, monkeypatch):
    server.repositories["org/name"] = CHECKPOINT
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(
        DiskFull, match=r"/hub is full \(0 MB needed, 0 MB free\).*or set HF_HOME to a folder"
    ):
        store.pull("hf:org/name")
    assert server.asked == []


def test_a_store_on_another_disk_than_the_cache_must_have_room_too(server, store, monkeypatch):
    server.repositories["org/name"] = CHECKPOINT
    stat = Path.stat

    def elsewhere(path, **options):
        found = stat(path, **options)
        if store.root not in path.parents:
            return found
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:]))

    def free(path):
        return type("Usage", (), {"free": 100 if store.root in path.parents else 1 << 40})

    monkeypatch.setattr(Path, "stat", elsewhere)
    monkeypatch.setattr(hub.shutil, "disk_usage", free)
    with pytest.raises(DiskFull, match="or set LQ_HOME to a folder"):
        store.pull("hf:org/name")
    assert server.asked == []


def test_a_cache_that_fills_up_names_its_own_variable(server, store, monkeypatch):
    server.repositories["org/name"] = CHECKPOINT

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(DiskFull, match=r"holds .*/hub is full.*or set HF_HOME to a folder"):
        store.pull("hf:org/name")


def test_a_hub_that_names_no_commit_is_refused(server, store, monkeypatch):
    server.repositories["org/name"] = CHECKPOINT
    monkeypatch.setattr(sys.modules[__name__], "COMMIT", None)
    with pytest.raises(FetchFailed, match=r"names no commit.*HF_ENDPOINT"):
        store.pull("hf:org/name")


GGUFS = [
    "m-Q4_K_M.gguf", "m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf",
    "mmproj-m-Q8_0.gguf", "README.md",
]  # fmt: skip


@pytest.mark.parametrize(
    ("reference", "chosen"),
    [
        (HubReference("", "o/n", variant="q4_k_m"), GGUFS[:1]),
        (HubReference("", "o/n", variant="Q8_0"), GGUFS[1:3]),
        (HubReference("", "o/n", file="m-Q8_0-00001-of-00002.gguf"), GGUFS[1:3]),
        (HubReference("", "o/n", file="m-Q4_K_M.gguf"), GGUFS[:1]),
    ],
)
def test_a_gguf_is_chosen_by_file_or_type_with_all_its_pieces(reference, chosen):
    assert hub.choose(reference, GGUFS) == chosen


def test_a_gguf_in_a_subfolder_of_the_repository_is_stored_at_the_top(server, store, smollm2_gguf):
    server.repositories["org/name"] = {"deep/m-Q4_1.gguf": smollm2_gguf.read_bytes()}
    entry = store.pull("hf:org/name/deep/m-Q4_1.gguf")
    assert (entry.name, entry.file.name) == ("m-Q4_1", "m-Q4_1.gguf")
    assert store.resolve_model("m-Q4_1") == entry.file


def test_a_choice_that_is_not_clear_lists_the_offers():
    with pytest.raises(FetchFailed, match=r"holds 3 GGUF files; name one .* m-Q4_K_M\.gguf"):
        hub.choose(HubReference("", "o/n"), GGUFS)
    with pytest.raises(FetchFailed, match=r"no GGUF of type Q2_K; it has m-Q4_K_M\.gguf"):
        hub.choose(HubReference("", "o/n", variant="Q2_K"), GGUFS)
    with pytest.raises(FetchFailed, match=r"several GGUF of type Q4_0"):
        hub.choose(HubReference("", "o/n", variant="Q4_0"), ["a-Q4_0.gguf", "b-Q4_0.gguf"])
    with pytest.raises(FetchFailed, match=r"holds no file 'x\.gguf'"):
        hub.choose(HubReference("", "o/n", file="x.gguf"), GGUFS)


def test_a_repository_of_pickles_is_refused_by_name():
    with pytest.raises(NotAModel, match=r"pickles \(pytorch_model\.bin\)"):
        hub.choose(HubReference("", "o/n"), ["config.json", "pytorch_model.bin"])


def test_paths_that_leave_the_folder_are_never_chosen():
    paths = ["../evil.json", "/etc/evil.json", "a/../../evil.safetensors", "config.json", "model.safetensors"]
    assert hub.choose(HubReference("", "o/n"), paths) == ["config.json", "model.safetensors"]
