"""Models out of wheels, fetched by the real pip from a folder of local wheels; nothing in them is run."""

import hashlib
import os
import zipfile

import gguf
import numpy as np
import pytest

from models.gguf import InvalidGGUF
from models.kinds import NotAModel
from models.reference import InvalidReference
from models.source import DiskFull, FetchFailed
from models.sources import pip
from models.store import NameTaken, Store


def gguf_bytes(folder) -> bytes:
    """A small valid model file."""
    path = folder / "source.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.arange(3200, dtype=np.float32).reshape(100, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def wheel(folder, name: str, members: dict[str, bytes], version: str = "1.0"):
    """A wheel that would fail loudly if anything in it were imported."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = members | {
        f"{module}/__init__.py": b"raise SystemExit('a package of weights was executed')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"]))


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The only index pip is configured for: a folder of wheels."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", folder.as_uri())
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def parts(mirror, data: bytes, count: int = 3) -> str:
    """`data` cut into `count` wheels; returns the reference that joins them."""
    size = -(-len(data) // count)
    for n in range(1, count + 1):
        wheel(mirror, f"piece{n}", {f"piece{n}/data/p{n:02}.bin": data[(n - 1) * size : n * size]})
    digest = hashlib.sha256(data).hexdigest()
    return f"pypi:piece{{1..{count}}}==1.0#piece{{n}}/data/p{{n:02}}.bin?file=whole.gguf&sha256={digest}"


def test_a_member_of_a_wheel_is_stored_with_its_manifest(mirror, store, tmp_path):
    data = gguf_bytes(tmp_path)
    wheel(mirror, "tiny-model", {"tiny_model/tiny.gguf": data})
    reports = []
    entry = store.pull(
        "pypi:tiny-model==1.0#tiny_model/tiny.gguf", progress=lambda *report: reports.append(report)
    )
    assert entry.file.read_bytes() == data
    record = entry.manifest.files[0]
    assert (record.path, record.size_bytes) == ("tiny.gguf", len(data))
    assert record.sha256 == hashlib.sha256(data).hexdigest()
    assert (entry.name, entry.kind, entry.manifest.revision) == ("tiny", "gguf", "1.0")
    assert any(what.startswith("unpacking") and done == total for what, done, total in reports)
    assert not store.partial()


def test_parts_are_joined_in_order_and_checked(mirror, store, tmp_path):
    data = gguf_bytes(tmp_path)
    assert store.pull(parts(mirror, data, 11)).file.read_bytes() == data


def test_an_interrupted_join_goes_on_after_the_last_whole_part(mirror, store, tmp_path, monkeypatch):
    data = gguf_bytes(tmp_path)
    reference = parts(mirror, data)
    original, asked = pip.download, []

    def interrupting(part, *args, **kwargs):
        asked.append(part.package)
        if part.package == "piece3" and len(asked) == 3:
            raise KeyboardInterrupt
        return original(part, *args, **kwargs)

    monkeypatch.setattr("models.sources.pypi.download", interrupting)
    with pytest.raises(KeyboardInterrupt):
        store.pull(reference)
    assert store.entries() == []
    assert store.partial()[0][0] == "whole"
    assert store.pull(reference).file.read_bytes() == data
    assert asked == ["piece1", "piece2", "piece3", "piece3"]


def test_bytes_appended_after_the_last_note_are_cut_off_again(mirror, store, tmp_path, monkeypatch):
    data = gguf_bytes(tmp_path)
    reference = parts(mirror, data)
    from models.sources import pypi

    original = pypi._note

    def crash(note, parts_done, writer):
        if parts_done == 2:
            raise KeyboardInterrupt
        original(note, parts_done, writer)

    monkeypatch.setattr(pypi, "_note", crash)
    with pytest.raises(KeyboardInterrupt):
        store.pull(reference)
    monkeypatch.setattr(pypi, "_note", original)
    assert store.pull(reference).file.read_bytes() == data


def test_other_content_than_pinned_is_refused_and_forgotten(mirror, store, tmp_path):
    wheel(mirror, "tiny-model", {"tiny_model/tiny.gguf": gguf_bytes(tmp_path)})
    with pytest.raises(FetchFailed, match="serves other content than expected"):
        store.pull("pypi:tiny-model==1.0#tiny_model/tiny.gguf?sha256=" + "0" * 64)
    assert store.entries() == []
    assert store.partial() == []


def test_a_single_gguf_needs_no_member(mirror, store, tmp_path):
    wheel(mirror, "tiny-model", {"tiny_model/deep/tiny.gguf": gguf_bytes(tmp_path)})
    assert store.pull("pypi:tiny-model==1.0").file.name == "tiny.gguf"


def test_a_missing_member_is_answered_with_what_the_wheel_offers(mirror, store):
    wheel(mirror, "tiny-model", {"tiny_model/a.gguf": b"", "tiny_model/m/config.json": b"{}"})
    for reference in ("pypi:tiny-model==1.0#tiny_model/nothing", "pypi:tiny-model==1.0#../tiny_model/a.gguf"):
        with pytest.raises(FetchFailed, match=r"name one of tiny_model/a\.gguf, tiny_model/m after #"):
            store.pull(reference, name="x")


def test_a_member_that_is_no_model_is_refused_and_not_visible(mirror, store):
    wheel(mirror, "tiny-model", {"tiny_model/a.gguf": b"GGUF junk that goes on for some time"})
    with pytest.raises(InvalidGGUF):
        store.pull("pypi:tiny-model==1.0#tiny_model/a.gguf")
    assert store.entries() == []


@pytest.mark.usefixtures("mirror")
def test_an_unknown_package_says_where_it_looked(store):
    with pytest.raises(FetchFailed, match="no such wheel on the index that pip is configured for"):
        store.pull("pypi:lq-no-such-package==1.0#x", name="x")


def test_a_source_distribution_is_never_built(mirror, store):
    (mirror / "evil-1.0.tar.gz").write_bytes(b"not even a tar file")
    with pytest.raises(FetchFailed, match="no such wheel"):
        store.pull("pypi:evil==1.0#x", name="x")


@pytest.mark.usefixtures("mirror")
def test_an_unreachable_index_is_one_line_with_a_remedy(store, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(FetchFailed, match="pip reaches no package index") as failure:
        store.pull("pypi:tiny-model==1.0#x", name="x")
    assert "\n" not in str(failure.value)


def test_pip_on_a_full_disk_keeps_what_there_is(mirror, store, monkeypatch, tmp_path):
    reference = parts(mirror, gguf_bytes(tmp_path))
    original = pip._run

    def full(part, incoming, progress, label):
        if part.package == "piece2":
            return 1, [
                "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
            ]
        return original(part, incoming, progress, label)

    monkeypatch.setattr(pip, "_run", full)
    with pytest.raises(DiskFull, match="goes on where it stopped"):
        store.pull(reference)
    assert store.entries() == []
    assert store.partial()[0][1] > 0


def test_the_same_name_from_another_source_is_refused(mirror, store, tmp_path):
    wheel(mirror, "tiny-model", {"tiny_model/tiny.gguf": gguf_bytes(tmp_path)})
    store.pull("pypi:tiny-model==1.0#tiny_model/tiny.gguf")
    wheel(mirror, "tiny-model", {"tiny_model/tiny.gguf": gguf_bytes(tmp_path)}, version="2.0")
    with pytest.raises(NameTaken, match=r"already holds 'tiny'.*--name.*lq rm tiny"):
        store.pull("pypi:tiny-model==2.0#tiny_model/tiny.gguf")


def test_a_folder_of_a_wheel_cannot_write_outside_the_store(mirror, store, tmp_path):
    evil = {"evil/m/config.json": b"{}", f"evil/m/{tmp_path}/out.json": b"x", "evil/m/../../out.json": b"x"}
    wheel(mirror, "evil", evil)
    with pytest.raises(NotAModel, match="no model found"):
        store.pull("pypi:evil==1.0#evil/m")
    assert not list(tmp_path.rglob("out.json"))


def test_a_pinned_hash_is_about_one_file_and_no_folder(mirror, store, monkeypatch):
    wheel(mirror, "tiny-model", {"tiny_model/m.gguf/config.json": b"{}", "tiny_model/m.gguf/x.json": b"{}"})
    with pytest.raises(FetchFailed, match=r"holds no file 'tiny_model/m\.gguf', and sha256= and file="):
        store.pull("pypi:tiny-model==1.0#tiny_model/m.gguf?sha256=" + "0" * 64)

    def never(*_):
        raise AssertionError("it was downloaded")

    monkeypatch.setattr(pip, "_run", never)
    with pytest.raises(InvalidReference, match=r"sha256 pins one \.gguf file, and 'tiny_model/m' is none"):
        store.pull("pypi:tiny-model==1.0#tiny_model/m?sha256=" + "0" * 64)


def test_a_folder_of_pickles_is_refused(mirror, store):
    wheel(mirror, "old", {"old/m/config.json": b"{}", "old/m/pytorch_model.bin": b"x"})
    with pytest.raises(NotAModel, match=r"pickles \(pytorch_model\.bin\)"):
        store.pull("pypi:old==1.0#old/m")
