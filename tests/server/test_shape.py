"""What a model gets when the operator does not say: context first, then requests at once, within memory."""

import os
import stat
from dataclasses import replace

import pytest

from models.footprint import Footprint
from models.placement import Bytes
from server import machine
from server.machine import Machine, built_for_cuda, free_vram, this_machine
from server.shape import Shape, choose, fitting, rooms

MIB = 2**20


def cost(n_cells: int, n_parallel: int) -> Footprint:
    """100 MiB of weights, 1 KiB a token, 1 MiB a sequence."""
    return Footprint(100 * MIB, n_cells * 1024, n_parallel * MIB)


def chosen(room_mib: int, *, n_ctx_train: int | None = 8192, n_cores: int = 2, on_gpu: bool = False, **given):
    return choose(
        cost, n_ctx_train=n_ctx_train, room=Bytes(room_mib * MIB), n_cores=n_cores, on_gpu=on_gpu, **given
    )


def test_with_memory_enough_everybody_gets_the_context_that_the_model_was_trained_on():
    assert chosen(1000) == Shape(8192, 8, 65536)
    assert chosen(1000, n_ctx_train=2048) == Shape(2048, 8, 16384)
    assert chosen(1000, n_ctx_train=100) == Shape(100, 8, 800)
    assert chosen(1000, n_ctx_train=None) == Shape(4096, 8, 32768)


def test_machines_differ_in_how_many_they_serve_at_once():
    assert chosen(1000, n_cores=1).n_parallel == 4
    assert chosen(10_000, on_gpu=True) == Shape(8192, 32, 32 * 8192)


def test_a_long_context_is_shared_so_that_one_request_can_use_all_of_it():
    assert chosen(1000, n_ctx_train=32768) == Shape(32768, 8, 65536)
    assert chosen(1000, n_ctx_train=131072) == Shape(131072, 8, 131072)


def test_memory_bounds_the_context_at_half_of_what_the_rest_leaves():
    assert chosen(208, n_ctx_train=131072) == Shape(51200, 8, 51200)  # half of 100 MiB
    assert chosen(1000, n_ctx_train=10**7).n_ctx == 456_704


def test_where_memory_is_short_fewer_are_served_at_once():
    assert chosen(108 + 32) == Shape(8192, 8, 16384)
    assert chosen(104 + 20) == Shape(8192, 4, 10240)
    assert chosen(101 + 6) == Shape(3072, 1, 3072)
    assert chosen(101) == Shape(512, 1, 512)  # too large, as whoever asked must find out
    assert chosen(10) == Shape(512, 1, 512)


def test_what_is_given_is_kept():
    assert chosen(1000, n_ctx=1000, n_parallel=3) == Shape(1000, 3, 3000)
    assert chosen(1000, n_ctx=20_000, n_parallel=4) == Shape(20_000, 4, 80_000)  # more than 8192 each
    assert chosen(1000, n_ctx=20_000) == Shape(20_000, 8, 65536)
    assert chosen(1000, n_parallel=2, n_ctx_train=32768) == Shape(32768, 2, 32768)
    assert chosen(1000, kv_cells=5000) == Shape(4864, 2, 5000)
    assert chosen(1000, kv_cells=10**6) == Shape(8192, 8, 65536)  # more could never be used
    assert chosen(1000, kv_cells=4096, n_ctx=1024, n_parallel=16) == Shape(1024, 16, 4096)
    assert chosen(10, n_ctx=9000) == Shape(9000, 1, 9000)  # does not fit, and is not made smaller in silence


def test_given_numbers_may_use_all_of_the_room_but_never_less_than_one_whole_request():
    assert chosen(100 + 4 + 16, n_ctx=8192, n_parallel=4) == Shape(8192, 4, 16384)
    assert chosen(100 + 4 + 4, n_ctx=8192, n_parallel=4) == Shape(8192, 4, 8192)


def test_models_share_what_their_weights_leave():
    budget = Bytes(1000)
    assert rooms([Bytes(100), Bytes(300)], budget) == [Bytes(400), Bytes(600)]
    assert rooms([Bytes(100)], budget) == [budget]
    assert rooms([Bytes(600), Bytes(700)], budget) == [budget, budget]  # they take turns with everything
    assert rooms([], budget) == []


def test_models_share_what_they_leave_of_each_memory():
    budget = Bytes(1000, 500)
    assert rooms([Bytes(100, 100), Bytes(100)], budget) == [Bytes(500, 300), Bytes(500, 200)]
    assert rooms([Bytes(100, 300), Bytes(100, 300)], budget) == [budget, budget]
    assert rooms([Bytes(100, 500), Bytes(100)], budget) == [Bytes(500, 500), Bytes(500, 0)]


def test_the_memory_that_is_full_first_bounds_the_context():
    def split(n_cells: int, n_parallel: int) -> Footprint:
        """Half of the weights and of the tokens on the GPU."""
        return replace(cost(n_cells, n_parallel), device_bytes=50 * MIB + n_cells * 512)

    def n_cells(host: int, device: int) -> int:
        return fitting(split, 1, Bytes(host * MIB, device * MIB), share=0.5)

    assert n_cells(51 + 16, 50 + 8) == 8192
    assert n_cells(51 + 8, 50 + 800) == 8192
    assert n_cells(51 + 8, 50 + 4) == 4096
    assert n_cells(51 + 8, 49) < 0
    assert n_cells(50, 5000) < 0


def test_what_is_known_to_fit_may_take_more_than_a_share():
    assert chosen(110, n_ctx_train=16384).n_ctx < 8192
    assert chosen(110, n_ctx_train=16384, least=8192) == Shape(8192, 4, 8192)
    assert chosen(1000, least=8192) == chosen(1000)


def test_models_get_four_fifths_of_what_is_free_or_what_the_operator_says():
    here = Machine(1000 * MIB, 2)
    assert here.budget(None) == Bytes(800 * MIB)
    assert here.budget(2000) == Bytes(2000 * MIB)
    assert here.budget(2000, 4000) == Bytes(2000 * MIB)  # there is no GPU


def test_a_gpu_has_a_budget_of_its_own():
    here = Machine(1000 * MIB, 2, 500 * MIB)
    assert here.on_gpu
    assert here.budget(None) == Bytes(800 * MIB, 450 * MIB)
    assert here.budget(100, 300) == Bytes(100 * MIB, 300 * MIB)


def test_this_machine_has_memory_and_cores():
    found = this_machine()
    assert found.available_bytes > 0
    assert 1 <= found.n_cores <= (os.cpu_count() or 1)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    """A function: what nvidia-smi prints and its exit code, None for a machine without it."""

    def install(prints: str | None, code: int = 0) -> None:
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        if prints is not None:
            tool = tmp_path / "nvidia-smi"
            tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\nprintf "{prints}"\nexit {code}\n')
            tool.chmod(tool.stat().st_mode | stat.S_IXUSR)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return install


@pytest.mark.parametrize(
    ("prints", "code", "expected"),
    [
        ("1000\\n2000\\n", 0, 3000 * MIB),
        ("", 0, None),
        ("[N/A]\\n", 0, None),
        ("no driver", 9, None),
        (None, 0, None),
    ],
)
def test_the_memory_of_gpus_is_what_their_driver_says(smi, prints, code, expected):
    smi(prints, code)
    assert free_vram() == expected


def test_only_gpus_that_the_process_may_use_count(smi, monkeypatch, tmp_path):
    smi("1000\\n")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert free_vram() is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert free_vram() == 1000 * MIB
    assert "--id=1" in (tmp_path / "asked").read_text()


def test_a_gpu_counts_only_when_llama_cpp_was_built_for_it(monkeypatch):
    monkeypatch.setattr(machine, "free_vram", lambda: 5 * MIB)
    monkeypatch.setattr(machine, "built_for_cuda", lambda: False)
    assert (this_machine().on_gpu, this_machine().device_bytes) == (False, None)
    monkeypatch.setattr(machine, "built_for_cuda", lambda: True)
    assert (this_machine().on_gpu, this_machine().device_bytes) == (True, 5 * MIB)
    assert this_machine().available_bytes > 5 * MIB


def test_the_build_is_told_by_its_files(monkeypatch, tmp_path):
    class Found:
        origin = str(tmp_path / "llama_cpp" / "__init__.py")

    monkeypatch.setattr(machine, "find_spec", lambda _: Found)
    (tmp_path / "llama_cpp" / "lib").mkdir(parents=True)
    assert not built_for_cuda()
    (tmp_path / "llama_cpp" / "lib" / "libggml-cuda.so").touch()
    assert built_for_cuda()
    monkeypatch.setattr(machine, "find_spec", lambda _: None)
    assert not built_for_cuda()
