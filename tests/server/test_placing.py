"""Layers on the GPU and types of cells, where the operator does not say: what is chosen and why."""

from dataclasses import replace

import pytest

from models.footprint import Footprint
from models.placement import Bytes
from server.placing import Placing, Wish, most_layers

MIB = 2**20
N_LAYERS = 11
WIDTHS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8, "q4_0": 4}
F16, Q8, Q4 = (("f16", "f16"), ("q8_0", "q8_0"), ("q4_0", "q4_0"))


def cost(n_cells: int, _n_parallel: int, types: tuple[str, str], gpu_layers: int) -> Footprint:
    """10 layers of 100 MiB with 100 MiB of head, 50 MiB that stay; 10 KiB a token in f16; 200 MiB a GPU."""
    kv = n_cells * 1024 * 10 * (WIDTHS[types[0]] + WIDTHS[types[1]]) // 32
    device = gpu_layers * 100 * MIB + max(0, gpu_layers - 1) * kv // 10 + (200 * MIB if gpu_layers else 0)
    return Footprint(1150 * MIB, kv, 200 * MIB if gpu_layers else 0, device_bytes=device)


def placed(host_mib: int, device_mib: int | None = None, **wish) -> Placing | None:
    n_layers = 0 if device_mib is None else N_LAYERS
    wish = {"n_ctx_train": 16384} | wish
    return Wish(cost=cost, n_layers=n_layers, **wish).place(Bytes(host_mib * MIB, (device_mib or 0) * MIB))


def types(*arguments, **wish):
    found = placed(*arguments, **wish)
    return found and found.types


def layers(*arguments, **wish):
    found = placed(*arguments, **wish)
    return found and found.gpu_layers


def test_cells_are_f16_wherever_all_of_the_context_fits():
    assert placed(1150 + 320) == Placing(0, F16, "all of the context fits", 16384)
    assert types(1150 + 160, n_ctx=16384) == F16  # what was given may use all of the room
    assert types(1150 + 100, kv_cells=10_240) == F16
    assert types(1150 + 320, n_ctx_train=None) == F16


def test_they_are_q8_0_where_that_makes_the_context_fit():
    assert placed(1150 + 319) == Placing(0, Q8, "f16 would hold 16332 tokens of 16384", 16384)
    assert types(1150 + 160) == Q8
    assert types(1150 + 159, n_ctx=16384) == Q8
    assert placed(1150 + 159, n_ctx=16384).why == "f16 would hold 16281 tokens of 16384"


def test_a_context_that_does_not_fit_either_way_is_shorter_and_stays_f16_while_it_is_worth_serving():
    found = placed(1150 + 320, n_ctx_train=131072)
    assert found == Placing(0, F16, "smaller ones would not hold all of it either")
    assert types(1150 + 159) == Q8  # f16 would leave less than 8192
    assert types(1150 + 100) == Q8
    assert placed(1150 + 79) is None


def test_they_are_q4_0_only_for_a_context_that_was_given_and_fits_in_no_other_way():
    assert types(1150 + 80, n_ctx=16384) == Q8
    assert types(1150 + 79, n_ctx=16384) == Q4
    assert types(1150 + 40, n_ctx=16384) == Q4
    assert types(1150 + 39, n_ctx=16384) is None
    assert types(1150 + 79) is None


def test_what_the_operator_gives_is_kept_and_the_other_of_the_two_is_chosen_beside_it():
    assert types(1150 + 320, type_k="q8_0") == ("q8_0", "f16")
    assert types(1150 + 100, n_ctx=16384, type_k="f16") == ("f16", "q4_0")
    assert types(1150 + 100, n_ctx=16384, type_k="f16", type_v="f16") is None
    assert types(5000, type_k="q4_0", type_v="bf16") == ("q4_0", "bf16")


def test_heads_that_no_block_fits_stay_f16():
    assert types(1150 + 319, can_quantize=False) == F16
    assert types(1150 + 159, n_ctx=16384, can_quantize=False) is None


def test_what_fits_nowhere_is_made_as_small_as_it_gets():
    given = Wish(cost=cost, n_layers=N_LAYERS, n_ctx=10**6)
    assert given.fallback(Bytes(10, 400 * MIB)) == Placing(1, Q4, "memory is short")
    assert replace(given, n_ctx=None).fallback(Bytes(10)).types == Q8
    assert replace(given, gpu_layers=5).fallback(Bytes(10)).gpu_layers == 5


def test_all_layers_go_to_the_gpu_if_they_fit():
    assert placed(5000, 5000) == Placing(N_LAYERS, F16, "all of the context fits", 16384)
    assert layers(5000, 1300 + 80) == N_LAYERS  # beside 8192 tokens
    assert types(5000, 1300 + 80) == F16
    assert layers(60, 5000) == N_LAYERS  # the host need not hold them


def test_a_wholly_offloaded_model_with_smaller_cells_comes_before_one_in_parts():
    assert placed(5000, 1300 + 40) == Placing(N_LAYERS, Q8, "f16 would hold 2048 tokens of 8192", least=8192)
    assert layers(5000, 1300 + 80, n_ctx=16384) == N_LAYERS
    assert types(5000, 1300 + 80, n_ctx=16384) == Q8


def test_where_not_all_fit_as_many_go_to_the_gpu_as_fit_beside_their_context():
    found = placed(5000, 1300)
    assert found == Placing(10, F16, "smaller ones would not hold all of it either", least=8192)
    assert layers(5000, 700) == 4  # 4 heads and layers, 3 of them with 8 MiB of cells each
    assert layers(5000, 200 + 100) == 1
    assert layers(5000, 299) == 0
    assert placed(5000, 700, n_ctx=16384) == Placing(4, F16, "all of the context fits", least=16384)


def test_the_rest_of_the_layers_needs_room_on_the_host():
    assert layers(900, 700) == 4
    assert layers(700, 700) is None


def test_a_number_of_layers_that_is_given_is_kept():
    assert layers(5000, 5000, gpu_layers=0) == 0
    assert layers(5000, 5000, gpu_layers=3) == 3
    assert layers(5000, 5000, gpu_layers=999) == N_LAYERS
    assert placed(5000, 1300, gpu_layers=11, n_ctx=16384) is None
    assert layers(5000, None, gpu_layers=7) == 0  # there is no GPU


@pytest.mark.parametrize("room", range(0, 1300, 50))
def test_one_layer_more_would_not_fit(room):
    def device_bytes(count: int) -> int:
        return count * 100 + (50 if count < N_LAYERS else 0)  # all together need nothing of the host

    count = most_layers(device_bytes, N_LAYERS, room)
    assert count == 0 or device_bytes(count) <= room
    assert count == N_LAYERS or device_bytes(count + 1) > room
