"""The parts of tuning alone: ranks cut by singular values, weights in 4 bits, saved states."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from quantize.tuning.four_bit import NF4, FourBitLinear, pack, unpack
from quantize.tuning.low_rank import BadRank, Spectrum
from quantize.tuning.state import BrokenState, Progressed, State


def product(rank: int, *, out: int = 12, into: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(out, rank)), draw.normal(size=(rank, into))


def test_a_rank_that_suffices_keeps_the_product_exactly():
    b, a = product(3)
    wide = np.hstack([b, b[:, :2]]), np.vstack([a, np.zeros((2, 9))])  # rank 3 written as 5
    spectrum = Spectrum.of(*wide)
    cut_b, cut_a = spectrum.factors(3)
    assert cut_b.shape == (12, 3)
    assert cut_a.shape == (3, 9)
    np.testing.assert_allclose(cut_b @ cut_a, b @ a, atol=1e-5)
    assert spectrum.lost(3) < 1e-20


def test_a_lower_rank_is_off_by_exactly_the_singular_values_left_out():
    b, a = product(6)
    spectrum, values = Spectrum.of(b, a), np.linalg.svd(b @ a, compute_uv=False)
    np.testing.assert_allclose(spectrum.values, values[:6], rtol=1e-9)
    for rank in range(1, 7):
        cut_b, cut_a = spectrum.factors(rank)
        error = np.linalg.norm(b @ a - cut_b.astype(np.float64) @ cut_a)
        assert error == pytest.approx(np.linalg.norm(values[rank:6]), abs=1e-5)  # Eckart and Young
        assert spectrum.lost(rank) == pytest.approx((values[rank:] ** 2).sum() / (values**2).sum(), abs=1e-12)


def test_energy_takes_the_least_rank_that_keeps_it():
    b, a = product(6)
    spectrum = Spectrum.of(b, a)
    for energy in (0.3, 0.6, 0.9, 0.99):
        rank = spectrum.rank_for(energy)
        assert 1 - spectrum.lost(rank) >= energy
        assert rank == 1 or 1 - spectrum.lost(rank - 1) < energy
    assert spectrum.rank_for(1.0) == 6
    assert Spectrum.of(np.zeros((4, 2)), a[:2]).rank_for(0.5) == 1
    with pytest.raises(BadRank, match=r"--energy is 1\.5"):
        spectrum.rank_for(1.5)


def test_four_bits_hold_the_nearest_level_of_each_block():
    weight = torch.randn(
        6, 40, generator=torch.Generator().manual_seed(0)
    )  # 240 numbers: the last block is short
    codes, scales = pack(weight)
    assert codes.numel() * 2 + scales.numel() * 4 == 256 + 16  # bytes: 4 bits a number and 16 a block of 64
    found = unpack(codes, scales, (6, 40), torch.float32)
    flat, made = weight.flatten(), found.flatten()
    levels = torch.tensor(NF4)
    for first in range(0, 240, 64):
        block = flat[first : first + 64]
        scale = block.abs().max().half().float()
        nearest = (block[:, None] - scale * levels).abs().amin(1)
        torch.testing.assert_close((made[first : first + 64] - block).abs(), nearest, atol=1e-6, rtol=1e-5)


def test_a_block_of_zeros_stays_zero():
    codes, scales = pack(torch.zeros(2, 64))
    assert torch.equal(unpack(codes, scales, (2, 64), torch.float32), torch.zeros(2, 64))


@pytest.mark.parametrize("bias", [False, True])
def test_a_four_bit_layer_is_the_linear_layer_of_its_expanded_weight_gradient_included(bias):
    torch.manual_seed(0)
    linear = nn.Linear(40, 24, bias=bias)
    layer = FourBitLinear(linear, dtype=torch.float32)
    assert not list(filter(lambda p: p.requires_grad, layer.parameters()))
    plain = nn.Linear(40, 24, bias=bias)
    plain.weight.data = layer.weight
    if bias:
        plain.bias.data = linear.bias.data
    left, right = (
        torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab"
    )
    torch.testing.assert_close(layer(left), plain(right))
    layer(left).square().sum().backward()
    plain(right).square().sum().backward()
    torch.testing.assert_close(left.grad, right.grad)
    assert 0 < (layer.weight - linear.weight).abs().max() < 0.1


def a_state() -> State:
    told = Progressed(
        step=3, training=[(1, 2.5), (2, 2.0)], held_out=[(2, 2.25)], best_step=2, best_loss=2.25
    )
    weights = {"a": torch.ones(2, 3)}
    return State(told, weights, {"a": torch.zeros(2, 3)}, {"exp_avg/a": torch.full((2, 3), 0.5)})


def test_a_saved_state_comes_back_as_it_was(tmp_path):
    a_state().save(tmp_path / "state.safetensors")
    found = State.load(tmp_path / "state.safetensors", {"a": torch.Size([2, 3])})
    assert found.told == a_state().told
    for group in ("weights", "best", "moments"):
        for name, tensor in getattr(a_state(), group).items():
            assert torch.equal(getattr(found, group)[name], tensor)


def test_a_state_of_another_adapter_or_no_state_is_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    a_state().save(path)
    with pytest.raises(BrokenState, match=r"of another adapter; delete it"):
        State.load(path, {"a": torch.Size([2, 4])})
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(BrokenState, match="cannot be read"):
        State.load(path, {})


def test_a_pickle_in_a_states_place_is_never_opened(tmp_path):
    class Danger:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    path = tmp_path / "state.safetensors"
    path.write_bytes(pickle.dumps(Danger()))
    with pytest.raises(BrokenState):
        State.load(path, {})
