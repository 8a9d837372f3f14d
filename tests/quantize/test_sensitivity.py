"""Gradients projected onto rounding errors, against finite differences and real divergences."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.network import network as network_module
from quantize.network import stream
from quantize.network.hessian import Hessians
from quantize.network.network import EMBEDDING, Network
from quantize.sensitivity import backward, inputs, projection
from quantize.sensitivity.backward import NothingScored, Sampling, measure_sensitivities
from quantize.sensitivity.head_gradient import HeadGradient
from quantize.sensitivity.projection import BadRounding, RowSample
from quantize.sensitivity.record import InvalidSensitivities, Sensitivities, UnknownChoice
from tests.quantize import tiny_decoders

WINDOWS = np.random.default_rng(6).integers(3, tiny_decoders.VOCABULARY, (5, 12))
SAMPLING = Sampling(n_draws=2, skip=3, seed=7)
STEPS = {"coarse": 2.0, "fine": 50.0}


def rounded(name: str, weights: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Two "types" that round every weight to a multiple of a step."""
    for kind, steps in STEPS.items():
        if not (kind == "coarse" and "attn_k" in name):
            yield kind, (np.round(weights * steps) / steps - weights).astype(np.float32)


def opened(path, variant: str, dtype: torch.dtype = torch.float64) -> Network:
    return Network.open(tiny_decoders.write(path / "tiny.gguf", variant), dtype=dtype)


def measured(network: Network, folder, errors=rounded, **options) -> Sensitivities:
    options = {"sampling": SAMPLING, "key": "k", **options}
    hessians = Hessians(folder / "h", "h")
    return measure_sensitivities(network, WINDOWS, errors, hessians, folder / "s", **options)


def error_of(network: Network, name: str, kind: str) -> torch.Tensor:
    """The rounding error of one weight."""
    return torch.from_numpy(dict(rounded(name, network.weight(name).float().numpy()))[kind]).double()


def products(network: Network) -> torch.Tensor:
    """(windows, tokens, vocabulary): the head's products at the scored positions."""
    with torch.no_grad():
        hidden = network.forward(torch.from_numpy(WINDOWS))
        return network.norm(hidden)[:, SAMPLING.skip :] @ network.weight(network.head_name).T


def noise(network: Network) -> list[torch.Tensor]:
    """The noise gradient of every draw, by the head's products."""
    with torch.no_grad():
        normed = network.norm(network.forward(torch.from_numpy(WINDOWS)))[:, SAMPLING.skip :]
        head = HeadGradient(network, normed, n_draws=SAMPLING.n_draws, seed=SAMPLING.seed)
        rows = slice(0, tiny_decoders.VOCABULARY)
        return head.noise(rows, slice(0, len(WINDOWS)), head.normaliser())[0]


@pytest.mark.parametrize("variant", ["llama, tied, with factors and biases", "qwen3", "phi3"])
def test_projection_is_the_gradients_inner_product_with_every_error(variant, tmp_path):
    network = opened(tmp_path, variant)
    made = measured(network, tmp_path)
    draws = noise(network)
    assert set(made.names) == set(network.matrices)
    assert made.projections.shape == (10, len(made.names), 2)
    for row, name in enumerate(made.names):
        weight = network.weight(name)
        for kind, error in rounded(name, weight.float().numpy()):
            outputs = []
            for step in (1e-4, -1e-4):
                network.replaced[name] = weight + step * torch.from_numpy(error).double()
                outputs.append(products(network))
            del network.replaced[name]
            slope = (outputs[0] - outputs[1]) / 2e-4
            true = torch.stack([(u * slope).sum((1, 2)) for u in draws], 1).flatten()
            found = made.projections[:, row, made.types.index(kind)]
            np.testing.assert_allclose(found, true, rtol=2e-4, atol=2e-5, err_msg=f"{name} {kind}")


def test_capped_and_sliding_model_too(tmp_path):
    network = opened(tmp_path, "gemma3, other pattern, capped")
    made, draws = measured(network, tmp_path), noise(network)
    for name in (EMBEDDING, "blk.0.attn_q.weight"):
        weight = network.weight(name)
        error = dict(rounded(name, weight.float().numpy()))["fine"]
        outputs = []
        for step in (1e-4, -1e-4):
            network.replaced[name] = weight + step * torch.from_numpy(error).double()
            outputs.append(products(network))
        del network.replaced[name]
        true = torch.stack([(u * (outputs[0] - outputs[1]) / 2e-4).sum((1, 2)) for u in draws], 1).flatten()
        found = made.projections[:, made.names.index(name), made.types.index("fine")]
        np.testing.assert_allclose(found, true, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("variant", ["qwen2", "gemma3, other pattern, capped"])
def test_predicted_divergence_of_small_errors_is_the_real_one(variant, tmp_path):
    network = opened(tmp_path, variant)
    made = measured(network, tmp_path, sampling=Sampling(n_draws=80, skip=3, seed=1))
    choice = dict.fromkeys(made.names, "fine")
    together = divergence_of(network, choice)  # 400 samples: a standard error of 7 %
    assert made.predict_jointly(choice) == pytest.approx(together, rel=0.2)
    alone = sum(divergence_of(network, {name: "fine"}) for name in made.names)
    assert made.predict(choice) == pytest.approx(alone, rel=0.2)
    assert made.predict(choice, made.shrunk()) == pytest.approx(alone, rel=0.2)


def divergence_of(network: Network, choice: dict[str, str], step: float = 0.1) -> float:
    """Nats a token for a tenth of the errors, times a hundred: divergence of larger ones is not quadratic."""
    tokens = torch.from_numpy(WINDOWS)
    with torch.no_grad():
        true = network.head(network.forward(tokens))[:, 3:].log_softmax(-1)
        network.replaced = {n: network.weight(n) + step * error_of(network, n, k) for n, k in choice.items()}
        candidate = network.head(network.forward(tokens))[:, 3:].log_softmax(-1)
    network.replaced = {}
    return (true.exp() * (true - candidate)).sum(-1).mean().item() / step**2


def test_noise_has_the_covariance_of_drawn_labels(tmp_path):
    network = opened(tmp_path, "qwen3")
    with torch.no_grad():
        normed = network.norm(network.forward(torch.from_numpy(WINDOWS[:1])))[:, -1:]
        p = network.logits_of(normed)[0, 0].softmax(-1)
    head = HeadGradient(network, normed, n_draws=4000, seed=0)
    draws, squares = head.noise(slice(0, len(p)), slice(0, 1), head.normaliser())
    samples = [noise[0, 0] for noise in draws]
    covariance = torch.stack(samples).T.cov()
    true = p.diag() - torch.outer(p, p)
    assert (covariance - true).norm() < 0.2 * true.norm()
    assert max(abs(sample.sum()) for sample in samples) < 1e-12
    torch.testing.assert_close(squares, true.diag())


def test_errors_are_weighed_by_the_hessian(tmp_path):
    network = opened(tmp_path, "qwen3")
    made = measured(network, tmp_path)
    hessians = Hessians(tmp_path / "h", "h")
    for name in ("blk.1.ffn_down.weight", "blk.0.attn_v.weight", "output.weight"):
        weights = network.weight(name).float().numpy()
        for kind, error in rounded(name, weights):
            place = made.names.index(name), made.types.index(kind)
            trace = np.trace(error @ hessians.read(name) @ error.T)
            assert made.traces[place] == pytest.approx(trace, rel=1e-4)
            assert made.squares[place] == pytest.approx(np.square(error).sum(), rel=1e-4)
            assert made.kronecker[place] > 0


@pytest.mark.parametrize("variant", ["qwen2", "qwen3"])  # the table of the first is its head
def test_a_sample_of_the_rows_stands_for_all_of_them(variant, tmp_path, monkeypatch):
    network = opened(tmp_path, variant)
    sampling = Sampling(n_draws=40, skip=3, seed=1)
    whole = measured(network, tmp_path / "whole", sampling=sampling)
    asked: Counter[str] = Counter()

    def noting(name, weights):
        asked[name] += len(weights)
        return rounded(name, weights)

    monkeypatch.setattr(projection, "SAMPLED_ROWS", 64)
    monkeypatch.setattr(projection, "TRACED_WEIGHTS", 0)
    monkeypatch.setattr(projection, "LEAST_TRACED", 24)
    monkeypatch.setattr(backward, "HEAD_WEIGHTS", 60 * tiny_decoders.WIDTH)
    monkeypatch.setattr(backward, "HEAD_ROWS", 20)
    made = measured(network, tmp_path / "sample", noting, sampling=sampling)
    assert asked["blk.0.ffn_up.weight"] == 64
    assert asked["blk.0.attn_k.weight"] == len(network.weight("blk.0.attn_k.weight"))
    shares = dict(zip(made.names, made.shares, strict=True))
    assert shares["blk.0.ffn_up.weight"] == 64 / len(network.weight("blk.0.ffn_up.weight"))
    assert shares["blk.0.attn_k.weight"] == shares[network.head_name] == 1
    occurring = len(np.unique(WINDOWS)) if network.is_tied else 0
    assert max(occurring, 40) < asked[network.head_name] < tiny_decoders.VOCABULARY
    for found, true in ((made.raw(), whole.raw()), (made.kronecker, whole.kronecker)):
        ratios = (found / true)[np.isfinite(true)]
        assert ratios.min() > 0.5
        assert ratios.max() < 2
        assert np.exp(np.log(ratios).mean()) == pytest.approx(1, abs=0.1)
    whole_too = [made.names.index(f"blk.1.{name}.weight") for name in ("attn_k", "attn_v")]
    np.testing.assert_allclose(made.raw()[whole_too], whole.raw()[whole_too], rtol=1e-3)


def test_rows_drawn_by_their_chances_count_as_all_in_the_mean():
    chances = np.array([0.1, 0.5, 1.0, 3.0])
    total = np.zeros(4)
    for seed in range(4000):
        sample = RowSample.drawn(chances, np.random.default_rng(seed))
        assert sample is not None
        total[sample.index] += sample.scale**2
    np.testing.assert_allclose(total / 4000, 1, atol=0.2)
    assert RowSample.drawn(np.ones(3), np.random.default_rng(0)) is None


def test_type_that_a_tensor_was_not_offered_is_unknown(tmp_path):
    made = measured(opened(tmp_path, "qwen3"), tmp_path)
    with pytest.raises(UnknownChoice, match=r"no sensitivity of blk\.0\.attn_k\.weight in coarse"):
        made.predict({"blk.0.attn_k.weight": "coarse"})
    with pytest.raises(UnknownChoice, match=r"blk\.7"):
        made.predict_jointly({"blk.7.attn_q.weight": "fine"})
    assert np.isfinite(made.shrunk()[~np.isnan(made.raw())]).all()


def test_windows_without_a_scored_token_are_refused(tmp_path):
    with pytest.raises(NothingScored, match="skipping 12 tokens leaves none of a window of 12"):
        measured(opened(tmp_path, "qwen3"), tmp_path, sampling=Sampling(skip=12))


def test_tensor_without_candidates_is_left_out(tmp_path):
    made = measured(
        opened(tmp_path, "qwen3"), tmp_path, lambda name, w: rounded(name, w) if "ffn" in name else ()
    )
    assert all("ffn" in name for name in made.names)
    assert len(made.names) == 9


class Stopped(Exception):
    pass


@pytest.mark.parametrize("in_memory", [0, 10**9])
@pytest.mark.parametrize(("stop", "again"), [(1, 7), (3, 7), (4, 0)])
def test_killed_pass_goes_on_with_the_next_layer_and_ends_the_same(
    stop, again, in_memory, tmp_path, monkeypatch
):
    monkeypatch.setattr(stream, "IN_MEMORY_BYTES", in_memory)
    network = opened(tmp_path, "qwen2")
    expected = measured(network, tmp_path / "other")
    asked: list[str] = []

    def noting(name, weights):
        asked.append(name)
        return rounded(name, weights)

    def progress(what: str, done: int, _total: int) -> None:
        if what == "measuring sensitivities" and done == stop + 1:
            raise Stopped

    with pytest.raises(Stopped):
        measured(network, tmp_path, noting, progress=progress, save_every_s=0)
    before = len(asked)
    made = measured(network, tmp_path, noting, save_every_s=0)
    n_again = sum(asked.count(name) > 1 for name in set(asked))
    assert before > 0
    assert n_again == again  # the layer that was not saved yet when the pass was killed
    np.testing.assert_array_equal(made.projections, expected.projections)
    np.testing.assert_allclose(made.kronecker, expected.kronecker, rtol=1e-6)
    assert list((tmp_path / "s").iterdir()) == []


def test_other_texts_or_candidates_do_not_continue_a_killed_pass(tmp_path):
    network = opened(tmp_path, "qwen2")

    def progress(what: str, done: int, _total: int) -> None:
        if what == "measuring sensitivities" and done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        measured(network, tmp_path, progress=progress, save_every_s=0)
    made = measured(network, tmp_path, key="other candidates")
    assert made.key != measured(network, tmp_path).key
    np.testing.assert_array_equal(made.projections, measured(network, tmp_path / "other").projections)


def test_errors_that_another_killed_pass_left_are_not_taken_over(tmp_path):
    network = opened(tmp_path, "qwen2")
    expected = measured(network, tmp_path / "other")

    def progress(what: str, done: int, _total: int) -> None:
        if what == "measuring sensitivities" and done == 3:
            raise Stopped

    def twice(name, weights):
        return [(kind, 2 * error) for kind, error in rounded(name, weights)]

    with pytest.raises(Stopped):
        measured(network, tmp_path, twice, key="twice", progress=progress, save_every_s=0)
    assert (tmp_path / "s" / "touched.npy").exists(), "the table of this model is its head"
    with pytest.raises(Stopped):
        measured(network, tmp_path, progress=progress, save_every_s=0)
    made = measured(network, tmp_path, save_every_s=0)
    np.testing.assert_array_equal(made.projections, expected.projections)


def test_layer_inputs_on_disk_give_what_those_in_memory_give(tmp_path, monkeypatch):
    network = opened(tmp_path, "qwen2", torch.float32)
    held = measured(network, tmp_path)
    monkeypatch.setattr(stream, "IN_MEMORY_BYTES", 0)
    stored = measured(network, tmp_path)
    difference = np.abs(stored.projections - held.projections).max(0)
    scale = np.sqrt(np.square(held.projections).mean(0))
    assert 0 < np.nanmax(difference / scale) < 0.1  # they were rounded to bfloat16
    np.testing.assert_allclose(stored.raw(), held.raw(), rtol=0.05)


def test_progress_counts_every_layer_twice_and_the_ends(tmp_path):
    seen = []
    measured(opened(tmp_path, "qwen2"), tmp_path, progress=lambda *told: seen.append(told))
    assert seen[:3] == [("reading the texts", i + 1, 3) for i in range(3)]
    assert seen[3:] == [("measuring sensitivities", i + 1, 5) for i in range(5)]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w: w[:, 1:], r"rounding .* to bad gave the shape \(\d+, \d+\) for"),
        (lambda w: np.where(w > 0, np.nan, w), "gave numbers that are not finite"),
    ],
)
def test_rounding_that_gives_something_else_is_named(wrong, message, tmp_path):
    with pytest.raises(BadRounding, match=message):
        measured(opened(tmp_path, "qwen3"), tmp_path, lambda _, w: [("bad", wrong(w))])


def test_file_reads_back_without_pickle(tmp_path):
    made = measured(opened(tmp_path, "qwen3"), tmp_path)
    made.save(tmp_path / "sensitivities.npz")
    again = Sensitivities.load(tmp_path / "sensitivities.npz")
    assert (again.key, again.names, again.types, again.n_scored, again.n_draws) == (
        (made.key, made.names, made.types, 9, 2)
    )
    for name in ("projections", "traces", "kronecker", "squares", "inputs", "shares"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))


@pytest.mark.parametrize(
    "content", [b"", b"not an archive", b"PK\x03\x04 cut off", b"PK\x05\x06" + bytes(18)]
)
def test_file_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "odd.npz").write_bytes(content)
    with pytest.raises(InvalidSensitivities, match=r"odd\.npz holds no sensitivities"):
        Sensitivities.load(tmp_path / "odd.npz")


@pytest.mark.parametrize("variant", ["llama, tied, with factors and biases", "phi3"])
def test_what_rounding_inputs_costs_is_by_the_gradients_inner_product_with_it(variant, tmp_path, monkeypatch):
    network = opened(tmp_path, variant)
    made, linear = measured(network, tmp_path), torch.nn.functional.linear
    true_inputs = {}
    for name in made.names:
        if name in (EMBEDDING, network.head_name):
            continue
        weight, outputs = network.weight(name), []
        network.replaced[name] = weight
        for step in (1e-4, -1e-4):

            def nudged(x, w, bias=None, *, weight=weight, step=step):
                return linear(x + step * (inputs.rounded(x, 32) - x) if w is weight else x, w, bias)

            monkeypatch.setattr(network_module.functional, "linear", nudged)
            outputs.append(products(network))
        monkeypatch.undo()
        network.replaced = {}
        true_inputs[name] = (outputs[0] - outputs[1]) / 2e-4
    normed = network.norm(network.forward(torch.from_numpy(WINDOWS)))[:, SAMPLING.skip :].detach()
    head = network.weight(network.head_name)
    true_inputs[network.head_name] = (inputs.rounded(normed, 32) - normed) @ head.T
    draw = noise(network)[0]
    for name, slope in true_inputs.items():
        projections = (draw * slope).sum((1, 2))
        n_scored = WINDOWS.shape[1] - SAMPLING.skip
        assert made.of_inputs(name, "Q5_1") == pytest.approx(
            float(projections.square().mean()) / (2 * n_scored), rel=1e-3
        )
        assert made.of_inputs(name, "F16") == 0
    assert network.is_tied or made.of_inputs(EMBEDDING, "Q5_1") == 0


def test_inputs_are_rounded_as_ggml_rounds_them():
    x = np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32) ** 3
    x[0] = 0
    found = inputs.rounded(torch.from_numpy(x), 32).numpy()
    ggml = dequantize_rows("Q8_0", quantize_rows("Q8_0", x, None), 512)
    np.testing.assert_allclose(found, ggml, rtol=1e-3, atol=np.abs(x).max() / 127 * 1e-3)
    coarse = inputs.rounded(torch.from_numpy(x), 256).numpy()
    assert np.square(coarse - x).sum() > 2 * np.square(found - x).sum()
    assert np.abs(coarse - x).max() <= np.abs(x).max() / 127 / 2 * 1.001


def test_types_have_the_blocks_of_their_kernels():
    assert {inputs.input_block(kind) for kind in ("Q4_0", "Q5_1", "Q8_0", "IQ4_NL")} == {32}
    assert {inputs.input_block(kind) for kind in ("Q2_K", "Q6_K", "IQ4_XS", "IQ3_XXS")} == {256}
    assert inputs.input_block("F16") is None
