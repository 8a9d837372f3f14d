"""A path whose content changed after it was stored: told, or replaced where that was asked for."""

import gguf
import numpy as np
import pytest
from safetensors.numpy import save_file

from models.store import ContentChanged, NameTaken, Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "home")


def write_gguf(path, description: str):
    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_description(description)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_path_whose_content_changed_is_told_and_not_taken_for_what_is_stored(store, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "one")
    first = store.pull(str(path))
    before = first.file.read_bytes()
    write_gguf(path, "two")  # as many bytes
    with pytest.raises(ContentChanged, match=r"m\.gguf has changed since it was stored as 'm'.*lq rm m"):
        store.pull(str(path))
    write_gguf(path, "longer")
    with pytest.raises(ContentChanged):
        store.add(path)
    assert store.get("m").file.read_bytes() == before
    path.unlink()
    assert store.pull(str(path), name="m") == first


def test_a_folder_in_which_a_file_came_or_went_has_changed(store, tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    save_file({"a": np.zeros((2, 3), np.float32)}, folder / "model.safetensors")
    store.pull(str(folder))
    (folder / "notes.txt").write_text("no part of a model")
    store.pull(str(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ContentChanged):
        store.pull(str(folder))


def test_an_addition_that_replaces_brings_the_new_content_and_its_hash(store, tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "one")
    old = store.add(path, replace=True)
    assert store.add(path, replace=True) == old
    write_gguf(path, "two")
    new = store.add(path, replace=True)
    assert new.file.read_bytes() == path.read_bytes()
    assert store.get("m").manifest.files[0].sha256 != old.manifest.files[0].sha256
    assert store.partial() == []
    with pytest.raises(NameTaken):
        store.add(write_gguf(tmp_path / "other/m.gguf", "x"), replace=True)
