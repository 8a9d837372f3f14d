"""Changes of a model that leave its function as it is, family by family."""

import numpy as np
import pytest

from models.gguf import read_header
from models.lora_gguf import TRANSFORMS
from quantize.calibration.imatrix import Entry, ImportanceMatrix
from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.network.hessian import Hessians
from quantize.network.network import Network
from quantize.network.stream import forward
from quantize.network.weights import NoSuchTensor
from quantize.transforms import padding
from quantize.transforms.exact import MAX_KL, NotExact, check_exact, largest_kl
from quantize.transforms.folded import Beyond, Fold, Folded
from quantize.transforms.kinds import CannotFold, transforms
from quantize.transforms.maps import Scale
from tests.quantize import tiny_decoders

TOKENS = np.random.default_rng(4).integers(3, tiny_decoders.VOCABULARY, 48).tolist()
WINDOWS = np.random.default_rng(5).integers(3, tiny_decoders.VOCABULARY, (6, 20))
VARIANTS = tuple(tiny_decoders.VARIANTS)
NAMES = [each.name for each in transforms(lambda weights, _: weights)]


def q4_0(weights, hessian):
    importance = np.diagonal(hessian).astype(np.float32)
    return dequantize_rows("Q4_0", quantize_rows("Q4_0", weights, importance), weights.shape[1])


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """The tiny models are 64 and 96 wide: neither is a multiple of 40."""
    monkeypatch.setattr(padding, "SUPER_BLOCK", 40)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Folded]:
    """Every variant, with its Hessians."""
    found = {}
    for variant in VARIANTS:
        folder = tmp_path_factory.mktemp("tiny")
        path = tiny_decoders.write(folder / "tiny.gguf", variant)
        forward(Network.open(path), WINDOWS, hessians=(hessians := Hessians(folder, "key")))
        found[variant] = Folded.open(path, hessians)
    return found


def descending(weights, hessian):
    """A rounding whose error is the smaller, the earlier the channels come that are driven most."""
    driven = np.diagonal(hessian)
    return weights + np.float32(1e-3 * np.average(np.arange(len(driven)), weights=driven))


def changed(model: Folded, name: str) -> Folded | None:
    """None where the change does not apply."""
    known = transforms(descending if name.startswith("order") else q4_0)
    transform = next(each for each in known if each.name == name)
    return None if transform.applies(model.header) else model.then(transform.fold(model))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_function_stays_in_torch(variant, name, models, tmp_path):
    model = models[variant]
    if (after := changed(model, name)) is None:
        refused = {"rotate-stream": ("tied", "qwen2", "gemma3"), "pad": ("qwen2", "phi3")}
        refused["biases"] = ("qwen3", "gemma3", "phi3")
        assert any(part in variant for part in refused[name])
        return
    path = tmp_path / "changed.gguf"
    after.write(path)
    assert check_exact(name, model.source.path, path, TOKENS) < 1e-6
    same = [t for t in model.tensors if not after.touched(t)]
    assert len(same) < len(model.tensors) or after.corrects  # something did change
    # what adapters that were trained on the checkpoint must not be applied to
    assert read_header(path).metadata.get(TRANSFORMS) == (None if name == "biases" else name)
    for tensor in same:
        np.testing.assert_array_equal(after.array(tensor), model.array(tensor))


@pytest.mark.parametrize("variant", VARIANTS)
def test_function_stays_in_llama_cpp_with_all_changes_together(
    variant, models, evaluate_gguf, max_kl, tmp_path
):
    model = after = models[variant]
    for name in NAMES:
        after = changed(after, name) or after
    after.write(tmp_path / "changed.gguf")
    truth = evaluate_gguf(model.source.path, TOKENS)
    # gemma: llama.cpp looks GELU up in a table of float16
    limit = MAX_KL if variant.startswith("gemma3") else 1e-5
    assert max_kl(truth, evaluate_gguf(tmp_path / "changed.gguf", TOKENS)) < limit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["llama", "qwen3", "gemma3", "phi3"])
def test_moments_follow_as_if_collected_again(variant, name, models, tmp_path):
    if (after := changed(models[variant], name)) is None:
        pytest.skip("refused")
    path = tmp_path / "changed.gguf"
    after.write(path)
    forward(Network.open(path), WINDOWS, hessians=(collected := Hessians(tmp_path, "key")))
    for tensor in after.tensors:
        if tensor.endswith("norm.weight") or len(after.shape(tensor)) == 1 or tensor == "token_embd.weight":
            continue
        truth = collected.read(tensor)
        root = np.sqrt(np.diagonal(truth))
        # both are kept with correlations in float16
        assert (np.abs(after.read(tensor) - truth) <= 2e-3 * np.outer(root, root)).all()
        assert after.count(tensor) == WINDOWS.size


def test_importance_follows_as_if_collected_again(models, tmp_path):
    model = models["llama"]

    def matrix(moments) -> ImportanceMatrix:
        names = [n for n in model.tensors if len(model.shape(n)) == 2 and n != "token_embd.weight"]
        sums = {n: 120 * np.diagonal(moments.read(n)).astype(np.float64)[None] for n in names}
        return ImportanceMatrix({n: Entry(s, np.array([120.0])) for n, s in sums.items()}, (), 6, 20)

    after = model
    for name in NAMES:
        after = changed(after, name) or after
    path = tmp_path / "changed.gguf"
    after.write(path)
    forward(Network.open(path), WINDOWS, hessians=(collected := Hessians(tmp_path, "key")))
    found, truth = after.importance(matrix(model.hessians)), matrix(collected)
    for name, values in truth.means().items():
        np.testing.assert_allclose(found.means()[name], values, rtol=1e-3, atol=1e-5 * values.max())


def test_lookup_that_is_rotated_counts_all_its_columns_alike(models):
    model = models["llama"]
    entries = {"token_embd.weight": Entry(np.arange(64.0)[None], np.array([4.0]))}
    after = changed(model, "rotate-stream")
    assert after is not None
    found = after.importance(ImportanceMatrix(entries, (), 1, 20)).entries["token_embd.weight"]
    np.testing.assert_allclose(found.sums, np.full((1, 64), 31.5))


@pytest.mark.parametrize("name", ["order-inner", "order-stream"])
def test_channels_are_put_into_the_order_that_rounds_best(name, models):
    model = models["qwen3"]
    after = changed(model, name)
    assert after is not None
    readers = [tensor for tensor in model.tensors if tensor.endswith("ffn_down.weight")]
    if name == "order-inner":
        for tensor in readers:
            driven = np.diagonal(after.read(tensor))
            assert (driven[1:] <= driven[:-1]).all()
    for reader in readers:
        assert sorted(after.array(reader).ravel()) == sorted(model.array(reader).ravel())


@pytest.mark.parametrize("name", ["order-inner", "order-stream", "scale-inner", "scale-norms"])
def test_change_with_nothing_to_gain_is_left_out_with_the_reason(name, models):
    exact = next(each for each in transforms(lambda weights, _: weights) if each.name == name)
    with pytest.raises(CannotFold, match=r"tried lowers? the loss"):
        exact.fold(models["llama"])


@pytest.mark.parametrize("name", ["scale-norms", "scale-values", "scale-inner"])
def test_search_never_raises_the_loss_that_it_searches_by(name, models):
    from quantize.transforms.scaling import loss

    model = models["qwen3"]
    after = changed(model, name)
    assert after is not None
    readers = [t for t in after.tensors if any(t in fold.columns for fold in after.folds)]
    assert readers
    ratios = [
        loss(after.array(t), after.read(t), q4_0) / loss(model.array(t), model.read(t), q4_0) for t in readers
    ]
    assert np.mean(ratios) < 1


def test_source_in_float16_is_written_as_float32_or_as_it_was(tmp_path, models):
    path = tiny_decoders.write(tmp_path / "half.gguf", "llama", type="F16")
    after = changed(Folded.open(path, models["llama"].hessians), "rotate-values")
    assert after is not None
    types = {}
    for dtype in ("F32", "source"):
        header = after.write(tmp_path / f"{dtype}.gguf", dtype=dtype)
        types[dtype] = {tensor.name: tensor.type.name for tensor in header.tensors}
        assert largest_kl(path, header.path, TOKENS) < (1e-6 if dtype == "F32" else 1e-2)
    assert types["F32"]["blk.0.attn_v.weight"] == "F32"
    assert types["F32"]["blk.0.attn_q.weight"] == "F16"  # nothing changed it
    assert types["source"]["blk.0.attn_v.weight"] == "F16"


def test_weight_beyond_float16_is_refused_by_name(tmp_path, models):
    path = tiny_decoders.write(tmp_path / "half.gguf", "llama", type="F16")
    fold = Fold("huge", {}, {"blk.1.attn_v.weight": Scale(np.full(32, 1e-8))})
    after = Folded.open(path, models["llama"].hessians).then(fold)
    with pytest.raises(Beyond, match=r"blk\.1\.attn_v\.weight holds .* beyond F16; write F32"):
        after.write(tmp_path / "out.gguf", dtype="source")
    assert not (tmp_path / "out.gguf").exists()


def test_change_that_is_not_exact_is_refused_by_name(models, tmp_path):
    model = models["llama"]
    wrong = Fold("half-a-scale", {"blk.1.ffn_down.weight": Scale(np.full(96, 1.2))}, {})
    model.then(wrong).write(tmp_path / "wrong.gguf")
    with pytest.raises(NotExact, match=r"half-a-scale is not exact .* leave it out"):
        check_exact(wrong.name, model.source.path, tmp_path / "wrong.gguf", TOKENS)


def test_numbers_that_are_not_finite_are_not_exact(models, tmp_path):
    model = models["llama"]
    path = tmp_path / "broken.gguf"
    weights = Fold("broken", {"output.weight": Scale(np.full(64, 1e38))}, {})
    model.then(weights).write(path)
    assert largest_kl(model.source.path, path, TOKENS) == float("inf")


def test_tied_model_says_what_a_second_table_would_cost(models):
    reasons = {each.name: each.applies(models["qwen2"].header) for each in transforms(q4_0)}
    assert "a second table would add" in str(reasons["rotate-stream"])
    assert "from the width of the stream" in str(reasons["pad"])
    assert reasons["scale-norms"] is None


def test_added_biases_are_zeros_that_later_changes_act_on(models):
    model = models["llama"]
    after = changed(model, "biases")
    assert after is not None
    assert len(after.added) == 7 * model.model.n_layer
    assert after.shape("blk.0.ffn_up.bias") == (96,)
    np.testing.assert_array_equal(after.array("blk.0.ffn_up.bias"), np.zeros(96))
    padded = changed(after, "pad")
    assert padded is not None
    assert padded.shape("blk.0.ffn_up.bias") == (120,)
    assert padded.shape("blk.0.attn_output.bias") == (80,)
    assert "output.bias" not in after
    with pytest.raises(NoSuchTensor, match=r"no tensor 'output\.bias'"):
        after.array("output.bias")


def test_aligned_model_has_nothing_to_pad(models, monkeypatch):
    monkeypatch.setattr(padding, "SUPER_BLOCK", 32)
    pad = transforms(q4_0)[-1]
    assert pad.applies(models["llama"].header) == "all rows are multiples of 32 already"


def test_unknown_architecture_is_left_out_with_the_reason(tmp_path):
    path = tiny_decoders.write(tmp_path / "tiny.gguf", "llama")
    data = path.read_bytes().replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0lllma", 1)
    path.write_bytes(data)
    for each in transforms(q4_0):
        assert "is not implemented" in str(each.applies(read_header(path)))


def test_norm_weight_of_zero_cannot_be_divided_out(models, tmp_path):
    path = tiny_decoders.write(tmp_path / "tiny.gguf", "llama")
    tensor = next(t for t in read_header(path).tensors if t.name == "blk.1.ffn_norm.weight")
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(np.zeros(1, np.float32).tobytes())
    rotate = next(each for each in transforms(q4_0) if each.name == "rotate-stream")
    with pytest.raises(CannotFold, match=r"blk\.1\.ffn_norm\.weight holds a weight of 0"):
        rotate.fold(Folded.open(path, models["llama"].hessians))


def test_means_follow_as_if_collected_again(models, tmp_path):
    model = after = models["llama, tied, with factors and biases"]
    for name in NAMES:
        after = changed(after, name) or after
    after.write(tmp_path / "changed.gguf")
    collected = Hessians(tmp_path, "key")
    forward(Network.open(tmp_path / "changed.gguf"), WINDOWS, hessians=collected)
    for name in model.tensors:
        if len(after.shape(name)) == 2:
            truth = collected.mean(name)
            np.testing.assert_allclose(after.mean(name), truth, atol=1e-4 * np.abs(truth).max())
