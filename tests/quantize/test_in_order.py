"""Rounding for what the rounded layers before put out: what is summed up, what it gives, how it goes on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from quantize.gguf_files.mixed_file import MixedSource, matrices
from quantize.gguf_files.parts import Parts
from quantize.gguf_files.types import quantize_rows
from quantize.mixes import in_order
from quantize.mixes.in_order import InOrder
from quantize.network.drift import Drift, Group, side_by_side
from quantize.network.hessian import Hessians, input_of
from quantize.network.network import EMBEDDING, Network
from quantize.network.stream import forward
from quantize.rounding.matrix import round_matrix
from tests.quantize import tiny_decoders

RANDOM = np.random.default_rng(7)
WINDOWS, HELD_OUT = (RANDOM.integers(3, tiny_decoders.VOCABULARY, (n, 20)) for n in (300, 50))


def opened(tmp_path: Path, variant: str, **changes) -> Network:
    return Network.open(tiny_decoders.write(tmp_path / "tiny.gguf", variant, **changes))


@pytest.mark.parametrize("variant", tiny_decoders.VARIANTS)
def test_a_layer_stops_before_the_products_of_each_input(variant, tmp_path):
    network = opened(tmp_path, variant)
    hidden = network.embed(torch.from_numpy(WINDOWS[:2]))
    *stages, end = network.layer(1).stages(hidden)
    fused = "attn_qkv.weight" in str(network.matrices)
    first = {"attn_qkv"} if fused else {"attn_q", "attn_k", "attn_v"}
    middle = {"ffn_up"} if fused else {"ffn_gate", "ffn_up"}
    parts = [{name.split(".")[2] for name in stage.names} for stage in stages]
    assert parts == [first, {"attn_output"}, middle, {"ffn_down"}]
    assert [input_of(stage.names[0]) for stage in stages] == [stage.names[0] for stage in stages]
    assert not end.names
    assert torch.equal(end.hidden, network.layer(1)(hidden))


def test_a_layer_goes_on_with_the_weights_that_it_has_then(tmp_path):
    network = opened(tmp_path, "qwen2")
    hidden = network.embed(torch.from_numpy(WINDOWS[:2]))
    layer, name = network.layer(0), "blk.0.ffn_down.weight"
    seen = []
    for stage in layer.stages(hidden):
        seen.append(stage.hidden)
        if name in stage.names:
            layer.weights[name] = torch.zeros_like(layer.weights[name])
    *_, before, end = seen
    assert torch.equal(end, before + layer.weights.get("blk.0.ffn_down.bias", torch.zeros(())))


@pytest.mark.parametrize("variant", ["qwen2", "gemma3"])
def test_what_is_computed_alike_needs_no_correction(variant, tmp_path):
    network = opened(tmp_path, variant)
    before = network.embed(torch.from_numpy(WINDOWS))
    hidden, made = before.clone(), before.clone()
    added = []
    for group in side_by_side(network.layer(0), network.layer(0), hidden, made):
        drift = group.drift()
        change, missing = drift.correction()
        assert drift.n_tokens == WINDOWS.size
        assert float(change.abs().max()) == 0
        assert missing is None or float(missing.abs().max()) == 0
        added.append(missing is not None)
    # in gemma3 a norm comes between
    assert added == ([False, True, False, True] if variant == "qwen2" else [False] * 4)
    assert torch.equal(hidden, network.layer(0)(before))
    assert torch.equal(hidden, made)


def test_tokens_without_a_hidden_state_are_left_out(tmp_path):
    network = opened(tmp_path, "qwen2")
    hidden = network.embed(torch.from_numpy(WINDOWS))
    hidden[:, 0] = 0.0  # an untrained token's: attention to itself alone adds nothing
    hidden[:, 1] = 1e-24
    for group in side_by_side(network.layer(0), network.layer(0), hidden, hidden.clone()):
        change, missing = group.drift().correction()
        assert torch.isfinite(change).all()
        assert missing is None or torch.isfinite(missing).all()


def test_correction_is_least_squares_with_a_ridge():
    random = np.random.default_rng(0)
    made = torch.from_numpy(random.normal(size=(4000, 8)) * np.geomspace(1e-3, 1e3, 8)).float()
    weights = torch.from_numpy(random.normal(size=(3, 8))).float()
    mixing = torch.eye(8) + 0.1 * torch.from_numpy(random.normal(size=(8, 8))).float()
    scale = torch.from_numpy(np.geomspace(1e-3, 1e3, 8)).float()
    source = (made / scale @ mixing.T) * scale
    missing = made / scale @ torch.from_numpy(random.normal(size=(8, 3))).float()
    parts = slice(1500), slice(1500, None)
    change, more = Drift.over((source[p], made[p], missing[p]) for p in parts).correction()
    assert more is not None
    wanted = source @ weights.T + missing
    left = wanted - made @ (weights + weights @ change + more).T
    assert float(left.square().sum() / (wanted - made @ weights.T).square().sum()) < 0.01


def rounding(network: Network, folder: Path, **changes) -> InOrder:
    source = MixedSource.open(network.file.header.path)
    types = {tensor.name: "Q4_0" for tensor in source.quantizable}
    wanted = {each.tensor.name: each for each in matrices(source, types, lambda *_: "in order")}
    parts = Parts(folder / "parts")
    parts.folder.mkdir(parents=True, exist_ok=True)
    parts.make(wanted[EMBEDDING], lambda rows: quantize_rows(rows.type, rows.weights, None))
    found = InOrder(
        source.path, wanted, frozenset({EMBEDDING}), parts, folder / "in-order", "key", 1, lambda *_: None
    )
    return dataclasses.replace(found, **changes)


def divergence(network: Network, made: Network) -> float:
    ids = torch.from_numpy(HELD_OUT)
    with torch.no_grad():
        truth, found = (each.head(each.forward(ids)).log_softmax(-1) for each in (network, made))
    return float((truth.exp() * (truth - found)).sum(-1).mean())


def with_parts(network: Network, job: InOrder) -> Network:
    made = Network.open(network.file.header.path)
    made.replaced = {name: job._values(name) for name, each in job.wanted.items() if each.key is not None}
    return made


def rounded_alone(network: Network, folder: Path) -> Network:
    """Every layer's tensor with error feedback, for the inputs that it has in the source."""
    hessians = Hessians(folder / "hessians", "")
    hessians.folder.mkdir()
    forward(network, WINDOWS, hessians=hessians)
    made = Network.open(network.file.header.path)
    for name in made.matrices:
        weights = network.weight(name).numpy()
        if name == EMBEDDING:
            data = quantize_rows("Q4_0", weights, None)
        else:
            data = round_matrix(weights, "Q4_0", hessian=hessians.read(name), n_tokens=WINDOWS.size).data
        made.replaced[name] = torch.from_numpy(gguf.dequantize(data, gguf.GGMLQuantizationType.Q4_0))
    return made


def bytes_of(job: InOrder) -> Sequence[bytes]:
    return [job.parts.path(each).read_bytes() for each in job.wanted.values() if each.key is not None]


@pytest.fixture(scope="module", params=["qwen2", "llama", "gemma3", "phi3"])
def finished(request, tmp_path_factory) -> tuple[Network, InOrder]:
    folder = tmp_path_factory.mktemp("in-order")
    network = opened(folder, request.param)
    job = rounding(network, folder)
    job.run(WINDOWS)
    return network, job


def test_a_file_is_closer_than_one_of_tensors_rounded_alone(finished, tmp_path):
    network, job = finished
    both = rounded_alone(network, tmp_path), with_parts(network, job)
    alone, ordered = (divergence(network, made) for made in both)
    # where norms stand behind all products, only how inputs differ is made up for
    bound = 1.05 if network.shape.windows[0] else 0.9
    assert 0 < ordered < bound * alone


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch):
    network, whole = finished
    monkeypatch.setattr(in_order, "SAVE_S", 0.0)

    def stop(_name: str, done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    job = rounding(network, tmp_path, progress=stop)
    with pytest.raises(KeyboardInterrupt):
        job.run(WINDOWS)
    assert (job.folder / "streams.safetensors").exists()
    drifts = []
    drift = Group.drift
    monkeypatch.setattr(Group, "drift", lambda self: drifts.append(self.names) or drift(self))
    dataclasses.replace(job, progress=lambda *_: None).run(WINDOWS)
    assert {name.split(".")[1] for names in drifts for name in names} == {
        str(layer) for layer in range(2, network.shape.n_layer)
    }
    assert bytes_of(job) == bytes_of(whole)
    assert not list(job.folder.iterdir())


def test_more_processes_make_the_same_bytes(finished, tmp_path):
    network, whole = finished
    job = rounding(network, tmp_path, n_processes=2)
    job.run(WINDOWS)
    assert bytes_of(job) == bytes_of(whole)
