"""The torch network against llama.cpp on the same GGUF, family by family."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch

from models.gguf import read_header
from quantize.network.network import Network
from quantize.network.shape import UnsupportedNetwork, read_shape
from quantize.network.weights import NoSuchTensor
from tests.quantize import tiny_decoders

TOKENS = np.random.default_rng(3).integers(3, tiny_decoders.VOCABULARY, 48).tolist()
#: llama.cpp looks GELU up in a table of float16.
LIMITS = {"gemma3": 1e-5, "gemma3, other pattern, capped": 1e-5}


def logits(network: Network, tokens: list[int]) -> np.ndarray:
    with torch.no_grad():
        return network.head(network.forward(torch.tensor([tokens])))[0].float().numpy()


@pytest.fixture
def tiny(tmp_path):
    return tiny_decoders.write(tmp_path / "tiny.gguf", "qwen3")


@pytest.mark.parametrize("variant", tiny_decoders.VARIANTS)
def test_logits_equal_llama_cpps(variant, evaluate_gguf, max_kl, tmp_path):
    path = tiny_decoders.write(tmp_path / "tiny.gguf", variant)
    truth = evaluate_gguf(path, TOKENS)
    assert max_kl(truth, logits(Network.open(path), TOKENS)) < LIMITS.get(variant, 1e-6)
    assert truth.std() > 0.5  # the comparison is not between flat predictions


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_stored_types_are_expanded_to_what_they_stand_for(kind, tmp_path):
    path = tiny_decoders.write(tmp_path / "tiny.gguf", "llama", type=kind)
    network = Network.open(tiny_decoders.write(tmp_path / "f32.gguf", "llama"))
    stored = gguf.GGMLQuantizationType[kind]
    for name in network.matrices:
        rows = gguf.quantize(network.weight(name).numpy(), stored)
        network.replaced[name] = torch.from_numpy(gguf.dequantize(rows, stored))
    np.testing.assert_array_equal(logits(Network.open(path), TOKENS), logits(network, TOKENS))


def test_long_factors_hold_where_sequences_may_be_longer_than_first_trained_on(tmp_path):
    keys = {"factors": "rope_factors_long"}
    path = tiny_decoders.write(tmp_path / "long.gguf", "phi3, half of the head turns, factors", **keys)
    long = logits(Network.open(path, n_ctx=tiny_decoders.CONTEXT + 1), TOKENS)
    short = logits(Network.open(path, n_ctx=tiny_decoders.CONTEXT), TOKENS)
    assert np.abs(long - short).max() > 0.01


def test_held_network_reads_each_weight_once_and_computes_the_same(tiny):
    held = Network.open(tiny, keep=True)
    np.testing.assert_array_equal(logits(held, TOKENS), logits(Network.open(tiny), TOKENS))
    assert held.weight("blk.0.attn_q.weight") is held.weight("blk.0.attn_q.weight")


def test_replaced_weight_changes_the_logits_as_the_file_with_it_would(tiny, tmp_path):
    network = Network.open(tiny)
    other = Network.open(tiny_decoders.write(tmp_path / "other.gguf", "qwen3", seed=2))
    for name in other.file:
        network.replaced[name] = other.weight(name)
    np.testing.assert_array_equal(logits(network, TOKENS), logits(other, TOKENS))


@pytest.mark.parametrize("part", ["attn_q.weight", "attn_k_norm.weight", "ffn_down.weight"])
def test_layer_is_differentiable_in_its_weights(tiny, part):
    network = Network.open(tiny, dtype=torch.float64)
    layer, name = network.layer(1), f"blk.1.{part}"
    hidden = network.embed(torch.tensor([TOKENS[:8]]))
    weight = layer.weights[name].requires_grad_()
    layer(hidden).square().sum().backward()
    gradient = weight.grad
    assert gradient is not None
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = []
    for step in (1e-5, -1e-5):
        layer.weights[name] = weight.detach() + step * direction
        losses.append(layer(hidden).square().sum().item())
    assert (losses[0] - losses[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-6)


def test_tap_sees_every_product_with_its_input_and_output(tiny):
    network, seen = Network.open(tiny), {}
    network.forward(torch.tensor([TOKENS]), lambda name, x, y: seen.update({name: (x, y)}))
    matrices = [n for n in network.matrices if n.startswith("blk")]
    assert sorted(seen) == sorted(matrices)
    for name, (x, y) in seen.items():
        torch.testing.assert_close(x @ network.weight(name).T, y)


def test_bfloat16_network_stays_close(tiny, max_kl):
    exact = logits(Network.open(tiny), TOKENS)
    assert 0 < max_kl(exact, logits(Network.open(tiny, dtype=torch.bfloat16), TOKENS)) < 0.05


def test_unknown_tensor_is_named(tiny):
    with pytest.raises(NoSuchTensor, match=r"no tensor 'blk\.9\.attn_q\.weight'"):
        Network.open(tiny).weight("blk.9.attn_q.weight")


def test_other_architecture_is_refused_by_name(tmp_path):
    from tests import tiny_models

    path = tiny_models.bert(tmp_path / "bert.gguf")
    with pytest.raises(UnsupportedNetwork, match="the architecture 'bert' is not implemented"):
        Network.open(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": "blk.0.ffn_gate_exps.weight"}, "ffn_gate_exps.weight has no part"),
        ({"extra": "blk.3.attn_q.weight"}, r"blk\.3\.attn_q\.weight has no part"),
        ({"left_out": "blk.1.attn_k_norm.weight"}, r"blk\.1\.attn_k_norm\.weight is missing"),
        ({"left_out": "blk.2.ffn_gate.weight"}, r"blk\.2\.ffn_gate\.weight is missing"),
    ],
)
def test_tensors_that_do_not_fit_the_graph_are_refused_by_name(change, message, monkeypatch, tmp_path):
    original = tiny_decoders.weights

    def changed(options, n_layer):
        made = original(options, n_layer)
        made.pop(change.get("left_out"), None)
        if "extra" in change:
            made[change["extra"]] = made["blk.0.attn_q.weight"]
        return made

    monkeypatch.setattr(tiny_decoders, "weights", changed)
    path = tiny_decoders.write(tmp_path / "odd.gguf", "qwen3")
    with pytest.raises(UnsupportedNetwork, match=message):
        Network.open(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.type", "longer", "the rope scaling 'longer' is not implemented"),
        ("attention.value_length", 8, "keys and values have different widths"),
        ("attention.head_count", [4, 4, 2], r"attention\.head_count is \[4, 4, 2\], not one count"),
        ("attention.head_count_kv", [2, 2, 2], None),
        ("rope.dimension_count", 7, "rope.dimension_count is 7 in heads of 32"),
        ("attention.layer_norm_rms_epsilon", "small", "rms_epsilon is 'small', not a number"),
    ],
)
def test_metadata_that_cannot_be_computed_is_refused_by_key(key, value, message, tiny):
    header = read_header(tiny)
    changed = replace(header, metadata={**header.metadata, f"qwen3.{key}": value})
    if message is None:
        assert read_shape(changed) == read_shape(header)
        return
    with pytest.raises(UnsupportedNetwork, match=message):
        read_shape(changed)
