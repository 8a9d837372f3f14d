"""Trying changes on a tiny model: what is measured, what is kept, what wins, and corrected biases."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.gguf import read_header
from models.tensor_types import TensorType
from quantize.calibration.imatrix import Entry, ImportanceMatrix
from quantize.measure import Backend, Passage
from quantize.network.hessian import Hessians
from quantize.network.network import Network
from quantize.network.stream import forward
from quantize.transforms import biases, padding
from quantize.transforms import explore as exploring
from quantize.transforms.biases import NotFloat32, correct, may_have_bias
from quantize.transforms.explore import explore, pays
from quantize.transforms.folded import Fold, Folded
from quantize.transforms.kinds import transforms
from quantize.transforms.maps import Scale
from quantize.transforms.trials import Ground, Outcome, Trials, fitting_type, nearest
from tests.quantize import tiny_decoders

RANDOM = np.random.default_rng(6)
WINDOWS = RANDOM.integers(3, tiny_decoders.VOCABULARY, (6, 20))
PASSAGES = [
    Passage(tuple(RANDOM.integers(3, tiny_decoders.VOCABULARY, 24).tolist()), tuple(range(4, 24)))
    for _ in range(4)
]


def ground_of(folder, variant: str) -> tuple[Folded, Ground]:
    folder.mkdir(exist_ok=True)
    path = tiny_decoders.write(folder / "tiny.gguf", variant)
    forward(Network.open(path), WINDOWS, hessians=(hessians := Hessians(folder, "key")))
    model = Folded.open(path, hessians)
    names = [t.name for t in model.source.quantizable if t.name != "token_embd.weight"]
    sums = {name: np.diagonal(hessians.read(name)).astype(np.float64)[None] * 120 for name in names}
    matrix = ImportanceMatrix({name: Entry(s, np.array([120.0])) for name, s in sums.items()}, (), 6, 20)
    silent = lambda *_: None  # noqa: E731
    return model, Ground(path, matrix, "Q4_0", PASSAGES, folder / "trials", "key", Backend(1), silent)


@pytest.fixture
def model_and_ground(tmp_path):
    return ground_of(tmp_path / "llama", "llama")


def scaled(model: Folded, name: str) -> Folded:
    transform = next(each for each in transforms(nearest("Q4_0")) if each.name == name)
    return model.then(transform.fold(model))


def test_trial_measures_each_scored_token_and_is_found_again(model_and_ground, monkeypatch):
    model, ground = model_and_ground
    found = Trials(ground).run(scaled(model, "scale-inner"))
    assert [len(part) for part in found.kl] == [20] * 4
    assert 1e-4 < found.mean.mean < 1
    assert found.largest_kl < 1e-6
    assert not list(ground.folder.glob("*.gguf"))
    monkeypatch.setattr(Trials, "_round", None)  # cannot be called
    again = Trials(ground).run(scaled(model, "scale-inner"))
    np.testing.assert_array_equal(np.concatenate(again.kl), np.concatenate(found.kl))
    assert (again.size_bytes, again.seconds) == (found.size_bytes, found.seconds)


def test_tensors_that_no_change_touches_are_not_rounded_again(model_and_ground):
    model, ground = model_and_ground
    Trials(ground).run(model)
    first = {path.name for path in (ground.folder / "parts").iterdir()}
    Trials(ground).run(scaled(model, "scale-inner"))
    new = {path.name for path in (ground.folder / "parts").iterdir()} - first
    assert len(new) == 2 * model.model.n_layer  # up and down; the gate stays


def test_better_rounding_is_another_trial_of_the_same_size(model_and_ground):
    model, ground = model_and_ground
    quick, better = (
        Trials(ground).run(scaled(model, "scale-inner"), rounding=r) for r in ("nearest", "best")
    )
    assert better.size_bytes == quick.size_bytes
    assert 0 < better.mean.mean != quick.mean.mean


def test_prediction_is_the_mean_ratio_of_losses(model_and_ground):
    model, ground = model_and_ground
    assert 0.3 < Trials(ground).predict(scaled(model, "scale-inner")) < 1
    harmless = Fold("twice", {"blk.0.ffn_down.weight": Scale(np.full(96, 2.0))}, {})
    assert Trials(ground).predict(model.then(harmless)) == pytest.approx(1, abs=1e-6)


def test_gain_is_paired_by_token():
    kl = tuple(RANDOM.random(10) for _ in range(5))
    better = Outcome(tuple(part - 0.125 for part in kl), 0, 0.0, 0.0)
    gain = better.gain(Outcome(kl, 0, 0.0, 0.0))
    assert gain.mean == pytest.approx(0.125)
    assert gain.standard_error == pytest.approx(0, abs=1e-12)


def outcome(gain: float, size_bytes: int = 1000) -> Outcome:
    """Divergence of .1 less a gain that differs by text, with a standard error of .065 of it."""
    spread = np.linspace(0.8, 1.2, 5) if gain else np.zeros(5)
    return Outcome(tuple(np.full(5, 0.1 - gain * each) for each in spread), size_bytes, 0.0, 1.0)


def test_gain_within_its_standard_error_does_not_pay():
    noisy = Outcome(
        tuple(np.full(5, 0.1 - each) for each in (0.05, -0.04, 0.03, -0.02, 0.01)), 1000, 0.0, 1.0
    )
    assert pays(outcome(0.02), outcome(0.0), 2000)
    assert not pays(outcome(-0.02), outcome(0.0), 2000)
    assert noisy.gain(outcome(0.0)).mean > 0
    assert not pays(noisy, outcome(0.0), 2000)
    better, worse = (Outcome((np.full(5, kl),), 1000, 0.0, 1.0) for kl in (0.1, 0.2))
    assert not pays(better, worse, 2000)  # one text has no standard error


def test_bytes_are_charged_what_they_would_buy_anyway():
    # 100 bytes over 2000 weights are .4 bits each: divergence falls to 4^-.4 = .57 of .1 by bits alone
    assert not pays(outcome(0.04, 1100), outcome(0.0), 2000)
    assert pays(outcome(0.05, 1100), outcome(0.0), 2000)


class Told(Trials):
    """Gains by the names of changes; `said` is what was asked for."""

    gains: dict[str, float]
    said: list[tuple[str, str]]

    def run(self, model, *, rounding="nearest", kind=None):
        """No measurement."""
        assert kind in (None, "Q4_K")
        name = " + ".join(fold.name for fold in model.folds)
        self.said.append((rounding, name))
        return outcome(self.gains.get(f"{rounding} {name}", 0.0))

    def predict(self, model):
        """Nothing gained."""
        assert model.folds
        return 1.0


def told(ground: Ground, **gains: float) -> Told:
    found = Told(ground)
    found.gains, found.said = {name.replace("_", " "): gain for name, gain in gains.items()}, []
    return found


def some(*names: str):
    return [each for each in transforms(nearest("Q4_0")) if each.name in names]


def test_exploration_uses_what_helps_and_says_why_it_left_the_rest(model_and_ground, monkeypatch):
    model, ground = model_and_ground
    monkeypatch.setattr(padding, "SUPER_BLOCK", 32)
    trials = told(ground, **{
        "nearest scale-inner": 0.02, "nearest biases": 0.01, "nearest rotate-values": -0.01,
        "nearest scale-inner + biases": 0.03, "best scale-inner + biases": 0.005,
    })  # fmt: skip
    known = some("scale-inner", "rotate-values", "biases", "pad")
    found = explore(model, trials, known, rounding="best")
    rows = {(row.name, row.rounding): row for row in found.trials}
    assert [fold.name for fold in found.model.folds] == ["scale-inner", "biases"]
    assert rows["pad", "nearest"].refused == "all rows are multiples of 32 already"
    assert not rows["rotate-values", "nearest"].used
    assert rows["scale-inner", "nearest"].used
    assert rows["scale-inner + biases", "best"].used
    assert [name for rounding, name in trials.said if rounding == "best"] == ["", "scale-inner + biases"]
    row = rows["scale-inner + biases", "nearest"]
    assert row.compared == "scale-inner"
    assert row.gain is not None
    assert row.gain.mean == pytest.approx(0.01)
    assert row.predicted == pytest.approx(0.08)


def test_change_that_adds_nothing_to_another_is_left_out(model_and_ground):
    model, ground = model_and_ground
    gains = {"nearest scale-inner": 0.02, "nearest biases": 0.01, "nearest scale-inner + biases": 0.02}
    found = explore(model, told(ground, **gains), some("scale-inner", "biases"), rounding="nearest")
    assert [fold.name for fold in found.model.folds] == ["scale-inner"]
    assert [row.name for row in found.trials if row.used] == ["scale-inner"]


def test_what_gains_nothing_under_the_better_rounding_is_not_used(model_and_ground):
    model, ground = model_and_ground
    trials = told(ground, **{"nearest scale-inner": 0.02})
    found = explore(model, trials, some("scale-inner"), rounding="best")
    assert not found.model.folds
    assert not any(row.used for row in found.trials)
    assert [row.name for row in found.trials] == ["none", "scale-inner", "none", "scale-inner"]


def test_padding_that_pays_opens_its_type_to_what_follows(tmp_path, monkeypatch):
    model, ground = ground_of(tmp_path / "llama", "llama")
    monkeypatch.setattr(padding, "SUPER_BLOCK", 40)
    trials = told(ground, **{"nearest pad": 0.09, "nearest pad + scale-inner": -0.1})
    found = explore(model, trials, some("pad", "scale-inner"), rounding="nearest")
    assert [fold.name for fold in found.model.folds] == ["pad"]
    assert [(row.name, row.type) for row in found.trials] == [
        ("pad", "Q4_K"), ("pad", "Q4_K"), ("pad + scale-inner", "Q4_K"),
    ]  # fmt: skip


def test_exploration_for_real_ends_with_what_it_measured_best(model_and_ground):
    model, ground = model_and_ground
    run = Trials(ground)
    found = explore(model, run, some("scale-inner", "rotate-values"), rounding="nearest")
    rows = {row.name: row for row in found.trials}
    used = {name for row in found.trials if row.used for name in row.name.split(" + ")}
    assert used == {fold.name for fold in found.model.folds}
    assert rows["none"].kl is not None
    assert all(row.seconds > 0 for row in found.trials if row.kl)
    run.clear()
    assert not list(ground.folder.glob("parts/*.tensor"))
    assert not list(ground.folder.glob("*.f32"))


def test_padded_rows_are_weighed_against_the_bytes_they_take(tmp_path, monkeypatch):
    model, ground = ground_of(tmp_path / "llama", "llama")
    monkeypatch.setattr(padding, "SUPER_BLOCK", 128)
    monkeypatch.setattr(exploring, "WIDE", {"Q4_0": "Q4_1"})
    found = explore(model, Trials(ground), some("pad"), rounding="nearest")
    row = next(row for row in found.trials if row.name == "pad")
    assert row.type == "Q4_1"
    assert row.kl is not None
    assert row.size_bytes is not None
    assert row.size_bytes > 1.5 * Trials(ground).run(model).size_bytes
    assert not row.used


@pytest.mark.parametrize("variant", ["llama", "llama, tied, with factors and biases", "qwen2"])
def test_biases_undo_the_mean_error_of_each_product(variant, tmp_path):
    model, ground = ground_of(tmp_path / "tiny", variant)
    model = model.then(some("biases")[0].fold(model))
    source = tmp_path / "changed.gguf"
    model.write(source)
    trial = Trials(ground)
    trial._round(model, source, "nearest", "Q4_0")
    before = {name: Network.open(trial._file).weight(name).numpy() for name in Network.open(source).file}
    correct(source, trial._file, model.mean)
    after, corrected = Network.open(trial._file), 0
    for name, old in before.items():
        new, weight = after.weight(name).numpy(), name.replace(".bias", ".weight")
        if not name.endswith(".bias") or name == "output.bias":
            np.testing.assert_array_equal(new, old)
            continue
        corrected += 1
        mean = model.mean(weight).astype(np.float64)
        made = after.weight(weight).numpy().astype(np.float64) @ mean + new
        np.testing.assert_allclose(made, model.array(weight) @ mean + model.array(name), atol=1e-4)
    assert corrected == {"llama": 7, "qwen2": 3}[model.model.architecture] * model.model.n_layer


def test_biases_are_where_the_graph_adds_them(tmp_path):
    header = Folded.open(tiny_decoders.write(tmp_path / "tiny.gguf", "llama"), Hessians(tmp_path, "")).header
    assert may_have_bias(header, "blk.0.ffn_down.weight")
    for name in ("token_embd.weight", "output.weight", "blk.0.attn_norm.weight", "blk.0.ffn_down.bias"):
        assert not may_have_bias(header, name)


def test_bias_in_half_precision_is_refused_by_name(model_and_ground, tmp_path, monkeypatch):
    model, ground = model_and_ground
    changed = model.then(some("biases")[0].fold(model))
    changed.write(tmp_path / "changed.gguf")

    def halved(path):
        header = read_header(path)
        return replace(header, tensors=tuple(replace(t, type=TensorType["F16"]) for t in header.tensors))

    monkeypatch.setattr(biases, "read_header", halved)
    with pytest.raises(NotFloat32, match=r"blk\.0\.attn_.*\.bias is F16"):
        correct(ground.source, tmp_path / "changed.gguf", model.mean)


def test_corrected_file_is_computed_alike_by_llama_cpp(model_and_ground, evaluate_gguf, max_kl, tmp_path):
    model, _ = model_and_ground
    fold = some("biases")[0].fold(model)
    path, random = tmp_path / "biased.gguf", np.random.default_rng(1)
    model.then(fold).write(path)
    with path.open("r+b") as file:
        for tensor in read_header(path).tensors:
            if tensor.name in fold.added:
                file.seek(tensor.offset)
                file.write(random.normal(0, 0.3, tensor.shape[0]).astype(np.float32).tobytes())
    tokens, network = list(PASSAGES[0].tokens), Network.open(path)
    truth, plain = evaluate_gguf(path, tokens), evaluate_gguf(model.source.path, tokens)
    with torch.no_grad():
        ours = network.head(network.forward(torch.tensor([tokens])))[0].numpy()
    assert max_kl(truth, ours) < 1e-6
    assert max_kl(plain, truth) > 1e-2


@pytest.mark.parametrize(("kind", "width", "wanted"), [
    ("Q4_K", 576, "Q5_0"), ("Q6_K", 576, "Q8_0"), ("Q4_K", 1536, "Q4_K"), ("IQ4_NL", 20, "F16"),
])  # fmt: skip
def test_rows_that_a_type_does_not_fit_get_what_stands_in_for_it(kind, width, wanted):
    assert fitting_type(kind, width) == wanted


def test_mix_gives_each_tensor_its_own_type(model_and_ground):
    model, ground = model_and_ground
    types = {tensor.name: "Q8_0" for tensor in model.source.quantizable} | {"output.weight": "Q4_0"}
    mixed = Trials(replace(ground, types=types)).run(model)
    assert mixed.size_bytes > Trials(ground).run(model).size_bytes
