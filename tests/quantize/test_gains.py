"""What our rounding leaves of each type's loss: which tensors are rounded, and what is made of it."""

import json

import numpy as np
import pytest

from quantize.gguf_files.mixed_file import MixedSource
from quantize.mixes import gains
from quantize.mixes.candidates import TYPES, Candidates
from quantize.mixes.encoding import Best, Losses
from quantize.mixes.gains import Sampler, factor, rounding_gains, sampled
from quantize.network.hessian import Hessians
from quantize.network.network import Network, lookups
from quantize.network.stream import forward
from tests.quantize import tiny_decoders

WINDOWS = np.random.default_rng(5).integers(3, tiny_decoders.VOCABULARY, (12, 64))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory) -> Sampler:
    folder = tmp_path_factory.mktemp("gains")
    path = tiny_decoders.write(folder / "tiny.gguf", "llama")
    hessians = Hessians(folder, "key")
    forward(Network.open(path), WINDOWS, hessians=hessians)
    source = MixedSource.open(path)
    encode = Best(Candidates({}), hessians, Losses(folder), lookups(source.files))
    return Sampler(source, source.choices(TYPES), encode, folder / "samples")


@pytest.fixture(scope="module")
def found(sampler) -> dict[str, dict[str, float]]:
    return rounding_gains(sampler, n_processes=1, progress=lambda _done, _total: None)


def test_every_kind_and_type_has_a_gain_and_none_is_a_loss(sampler, found):
    assert {"attn_q.weight", "attn_v.weight", "ffn_down.weight", "token_embd.weight"} <= set(found)
    values = [gain for types in found.values() for gain in types.values()]
    assert all(0 < gain <= 1 for gain in values)
    assert found["ffn_up.weight"]["Q4_0"] < 0.9  # error feedback under a Hessian of few tokens
    assert set(found["ffn_up.weight"]) == set(sampler.choices["blk.0.ffn_up.weight"]) & {
        "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL"
    }  # fmt: skip


def test_a_gain_is_the_geometric_mean_of_what_the_samples_say(sampler, found):
    records = [json.loads(path.read_text("utf-8")) for path in sampler.folder.glob("*.ffn_up.weight.json")]
    ratios = [record["Q5_0"][0] / record["Q5_0"][1] for record in records]
    assert found["ffn_up.weight"]["Q5_0"] == pytest.approx(np.exp(np.log(ratios).mean()))


@pytest.mark.usefixtures("found")
def test_what_was_sampled_is_not_rounded_again(sampler, monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(Best, "rounded", refuse)
    for name in sampled(list(sampler.choices)):
        sampler([name])


def test_few_rows_stand_for_a_matrix(sampler, monkeypatch, tmp_path):
    seen = []
    original = Best.rounded

    def noting(self, rows):
        seen.append(rows.weights)
        return original(self, rows)

    monkeypatch.setattr(Best, "rounded", noting)
    monkeypatch.setattr(gains, "ROWS", 5)
    other = Sampler(sampler.source, {"blk.0.ffn_up.weight": {"Q4_0": 1}}, sampler.encode, tmp_path)
    other(["blk.0.ffn_up.weight"])
    (weights,) = seen
    assert len(weights) == 5
    assert len(np.unique(weights, axis=0)) == 5


def test_tensors_of_a_kind_are_taken_evenly_over_the_layers():
    names = [f"blk.{layer}.{part}.weight" for layer in range(30) for part in ("attn_q", "ffn_up")]
    found = sampled([*names, "token_embd.weight"])
    assert found == [
        *(f"blk.{layer}.attn_q.weight" for layer in (5, 15, 25)),
        *(f"blk.{layer}.ffn_up.weight" for layer in (5, 15, 25)),
        "token_embd.weight",
    ]


def test_factor_is_one_for_what_only_ggml_rounds():
    known = {"ffn_up.weight": {"Q4_0": 0.25}}
    assert factor(known, "blk.3.ffn_up.weight", "Q4_0") == 0.5
    assert factor(known, "blk.3.ffn_up.weight", "IQ3_S") == 1
    assert factor(known, "blk.3.attn_q.weight", "Q4_0") == 1
