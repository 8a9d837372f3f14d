"""Where the weights lie: memory of their own when there is room, the file's pages else."""

from pathlib import Path

import pytest

from engine import memory
from engine.memory import HUGE_PAGES, TUNABLES, environment, uses_mmap
from engine.request import EngineConfig, InvalidRequest


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1000))
    return EngineConfig(path)


def test_a_model_that_takes_little_of_the_free_memory_is_read_into_it(config):
    assert not uses_mmap(config, on_gpu=False, available_bytes=2000)


def test_a_model_that_would_take_much_of_it_stays_in_the_files_pages(config):
    assert uses_mmap(config, on_gpu=False, available_bytes=1999)


def test_weights_on_their_way_to_a_gpu_stay_in_the_files_pages(config):
    assert uses_mmap(config, on_gpu=True, available_bytes=10**9)


@pytest.mark.parametrize("wanted", [True, False])
def test_the_operator_has_the_last_word(config, wanted):
    chosen = EngineConfig(config.model_path, use_mmap=wanted)
    assert uses_mmap(chosen, on_gpu=wanted, available_bytes=1000) is wanted


@pytest.mark.parametrize(("stat", "free"), [("anon 600\nfile 300\ninactive_file 250\n", 350), ("", 100)])
def test_what_a_container_has_read_from_files_is_free_again(tmp_path, monkeypatch, stat, free):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    for name, text in (("memory.max", "1000\n"), ("memory.current", "900\n"), ("memory.stat", stat)):
        (tmp_path / name).write_text(text)
    assert memory.available_memory() == free


def test_a_wrong_word_is_refused(config):
    with pytest.raises(InvalidRequest, match="use_mmap is 'maybe'; give true or false"):
        EngineConfig(config.model_path, use_mmap="maybe").validate()  # pyright: ignore[reportArgumentType]


def test_huge_pages_are_asked_for_beside_other_tunables_but_not_against_the_operators_own():
    assert environment({}) == {TUNABLES: HUGE_PAGES}
    assert environment({TUNABLES: "glibc.malloc.check=1"}) == {TUNABLES: f"glibc.malloc.check=1:{HUGE_PAGES}"}
    assert environment({TUNABLES: "glibc.malloc.hugetlb=0"}) == {}
