"""Recovery on tiny decoders: what is trained, what must not change, and that a stop changes nothing."""

import dataclasses
import itertools
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from models.gguf import read_header
from quantize.errors import QuantizeError
from quantize.gguf_files.packing import FORMATS, PARTS, unpack
from quantize.gguf_files.types import dequantize_rows, quantize_rows
from quantize.network.network import Network
from quantize.network.stream import digest_of
from quantize.recovery import memory, teacher, training
from quantize.recovery.loss import OtherVocabulary, UnknownTokens, backward, divergence
from quantize.recovery.memory import NoMemory
from quantize.recovery.recover import UnusableWindows, recover
from quantize.recovery.scales import Packed, expand, rewrite
from quantize.recovery.student import BrokenScales, NothingToTrain, Student
from quantize.recovery.teacher import Teacher
from quantize.recovery.training import Settings, TooFewWindows, batch, schedule
from tests.quantize import tiny_decoders

WINDOWS = np.random.default_rng(5).integers(3, tiny_decoders.VOCABULARY, (240, 16))
QUICK = Settings(tokens=36 * 256, batch=16, checks=6, held_back=0.2, scale_rate=3e-3, norm_rate=3e-3)
Pair = tuple[Path, Path]  # a model and its Q4_0
TIED = "llama, tied, with factors and biases"


def matrix(kind: str) -> np.ndarray:
    """(4, row_bytes) of random weights."""
    weights = np.random.default_rng(7).normal(0, 0.3, (4, 512)).astype(np.float32)
    return quantize_rows(kind, weights, None)


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Pair:
    """A model and its Q4_0."""
    folder = tmp_path_factory.mktemp("pair")
    source = tiny_decoders.write(folder / "source.gguf", TIED)
    return source, tiny_decoders.write(folder / "q4_0.gguf", TIED, type="Q4_0")


@pytest.fixture(scope="module")
def recovered(pair: Pair, tmp_path_factory):
    """What came of it, and the file."""
    folder = tmp_path_factory.mktemp("recovered")
    out = folder / "out.gguf"
    return recover(*pair, WINDOWS, out, settings=QUICK, folder=folder / "work", device="cpu"), out


def student_and_teacher(source, quantized, windows, **options):
    path = quantized.with_name("teacher.safetensors")
    teacher = Teacher.of(Network.open(source), windows, path, digest_of(windows, source))
    return Student(quantized, **options), teacher


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_ggmls(kind):
    data = matrix(kind)
    packed = Packed.of(FORMATS[kind], data)
    np.testing.assert_allclose(
        packed.values(packed.scale, packed.minimum).numpy(), dequantize_rows(kind, data, 512), rtol=1e-6
    )


@pytest.mark.parametrize("kind", FORMATS)
def test_gradients_of_scales_and_minimums_equal_finite_differences(kind):
    packed = Packed.of(FORMATS[kind], matrix(kind))
    random = np.random.default_rng(2)
    by_weight = torch.from_numpy(random.normal(size=(4, 512)))
    knobs = [packed.scale.double().requires_grad_()]
    if packed.minimum is not None:
        knobs.append(packed.minimum.double().requires_grad_())

    def loss() -> torch.Tensor:
        return (expand(packed, knobs[0], knobs[1] if len(knobs) > 1 else None) * by_weight).sum()

    loss().backward()
    for knob in knobs:
        for index in ((0, 0), (3, knob.shape[1] - 1)):
            step = 1e-3
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    knob[index] += sign * step
                    values.append(float(loss()))
                    knob[index] -= sign * step
            assert knob.grad is not None
            assert float(knob.grad[index]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize("kind", FORMATS)
def test_rewriting_changes_the_bytes_of_scales_and_no_other(kind):
    form, data = FORMATS[kind], matrix(kind)
    blocks = unpack(form, data)
    np.testing.assert_array_equal(rewrite(form, data, blocks.scale, blocks.minimum), data)
    minimum = None if blocks.minimum is None else blocks.minimum * np.float16(0.5)
    new = rewrite(form, data, blocks.scale * np.float16(1.25), minimum)
    changed = (new != data).reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]).any(0)
    at, halves = 0, set()
    for part in PARTS[kind]:
        if part.width == 2:
            halves |= {at, at + 1}
        at += part.width
    assert set(np.flatnonzero(changed)) <= halves
    assert changed.any()
    np.testing.assert_array_equal(unpack(form, new).codes, blocks.codes)


@pytest.mark.parametrize("variant", [TIED, "llama", "qwen3", "gemma3, other pattern, capped", "phi3"])
def test_gradients_through_the_network_equal_finite_differences(variant, tmp_path):
    source = tiny_decoders.write(tmp_path / "source.gguf", variant)
    quantized = tiny_decoders.write(tmp_path / "quantized.gguf", variant, type="Q4_1")
    student, teacher = student_and_teacher(source, quantized, WINDOWS[:4])
    tokens, chosen = torch.from_numpy(WINDOWS[:4]), np.arange(4)
    backward(student, teacher, tokens, chosen, 1.0)
    for kind in ("norms", "scales"):
        knobs = [knob for knob in student.knobs.values() if knob.kind == kind]
        for knob in knobs:
            assert knob.offset.grad is not None
            assert knob.offset.grad.abs().sum() > 0
        grads = [knob.offset.grad.clone() for knob in knobs if knob.offset.grad is not None]
        length = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
        found = []
        for sign in (1, -1):
            with torch.no_grad():
                for knob, grad in zip(knobs, grads, strict=True):
                    knob.offset.copy_(sign * 3e-3 * grad / length)
            found.append(backward(student, teacher, tokens, chosen, 0.0))
        for knob in knobs:
            knob.offset.detach().zero_()
        assert (found[0] - found[1]) / 6e-3 == pytest.approx(length, rel=0.03)


def test_every_norm_and_bias_is_trained_and_no_rotary_factor(pair: Pair):
    student = Student(pair[1])
    vectors = {t.name for t in read_header(pair[1]).tensors if len(t.shape) == 1}
    trained = {name for (name, _), knob in student.knobs.items() if knob.kind == "norms"}
    assert "rope_freqs.weight" in vectors
    assert trained == vectors - {"rope_freqs.weight"}


def test_layers_that_are_computed_again_give_the_same_gradients(pair: Pair):
    grads = []
    for lean in (False, True):
        student, teacher = student_and_teacher(*pair, WINDOWS[:4], lean=lean)
        backward(student, teacher, torch.from_numpy(WINDOWS[:4]), np.arange(4), 1.0)
        grads.append([knob.offset.grad for knob in student.knobs.values()])
    for kept, again in zip(*grads, strict=True):
        assert kept is not None
        torch.testing.assert_close(kept, again)


def test_a_student_predicts_what_its_file_does(pair: Pair):
    student, teacher = student_and_teacher(*pair, WINDOWS[:2])
    found = divergence(student, teacher, WINDOWS, np.arange(2))
    plain = Network.open(pair[1])
    with torch.no_grad():
        truth = teacher.log_probabilities(teacher.normed)
        mine = plain.head(plain.forward(torch.from_numpy(WINDOWS[:2]))).log_softmax(-1)
    np.testing.assert_allclose(found, (truth.exp() * (truth - mine)).sum(-1).numpy(), atol=1e-5)


def test_divergence_falls_on_text_held_back_and_in_llama_cpp(recovered, pair: Pair, evaluate_gguf):
    facts, out = recovered
    assert facts.helped
    assert facts.after < 0.95 * facts.before
    assert facts.n_checked == 48 * 16

    def mean_kl(path) -> float:
        total = 0.0
        for window in WINDOWS[-12:].tolist():
            truth, found = (
                torch.from_numpy(evaluate_gguf(each, window)).log_softmax(-1) for each in (pair[0], path)
            )
            total += float((truth.exp() * (truth - found)).sum(-1).mean())
        return total / 12

    assert mean_kl(out) < 0.95 * mean_kl(pair[1])


def test_types_sizes_metadata_and_codes_stay(recovered, pair: Pair):
    before, after = (read_header(path) for path in (pair[1], recovered[1]))
    assert before.tensors == after.tensors
    assert before.metadata == after.metadata
    data = [path.read_bytes() for path in (pair[1], recovered[1])]
    assert data[0][: before.data_offset] == data[1][: before.data_offset]
    assert len(data[0]) == len(data[1])
    changed = set()
    for tensor in before.tensors:
        old, new = (
            np.frombuffer(each, np.uint8, tensor.size_bytes, tensor.offset).reshape(
                tensor.n_elements // tensor.shape[0], -1
            )
            for each in data
        )
        if tensor.type.name == "Q4_0":
            codes = [unpack(FORMATS["Q4_0"], rows).codes for rows in (old, new)]
            np.testing.assert_array_equal(codes[0], codes[1])
        if (old != new).any():
            changed.add(tensor.name)
    assert changed == {tensor.name for tensor in before.tensors} - {"rope_freqs.weight"}


def test_types_without_block_scales_keep_their_bytes_and_norms_make_up_for_them(pair: Pair, tmp_path):
    other = tiny_decoders.write(tmp_path / "other.gguf", TIED, type="F16", seed=1)
    facts = recover(pair[0], other, WINDOWS, tmp_path / "out.gguf", settings=QUICK, folder=tmp_path / "work")
    assert facts.n_scales == 0
    assert facts.n_norms > 0
    old, new = other.read_bytes(), (tmp_path / "out.gguf").read_bytes()
    for tensor in read_header(other).tensors:
        if tensor.type.name == "F16":
            part = slice(tensor.offset, tensor.offset + tensor.size_bytes)
            assert old[part] == new[part]


def test_rates_that_are_far_too_high_come_down(pair: Pair, tmp_path):
    wild = dataclasses.replace(QUICK, scale_rate=1.0, norm_rate=1.0, row_rate=1.0, warm_up=0.0)
    facts = recover(*pair, WINDOWS, tmp_path / "out.gguf", settings=wild, folder=tmp_path / "work")
    divergences = [kl for _, kl in facts.history]
    assert max(divergences[1:]) > facts.before > facts.after


def test_what_does_not_help_leaves_every_byte_as_it_was(pair: Pair, tmp_path):
    wild = dataclasses.replace(QUICK, scale_rate=1.0, norm_rate=1.0, warm_up=0.0, slower=1.0)
    facts = recover(*pair, WINDOWS, tmp_path / "out.gguf", settings=wild, folder=tmp_path / "work")
    assert not facts.helped
    assert facts.best_step == 0
    assert facts.n_steps < 36  # it gave up early
    assert (tmp_path / "out.gguf").read_bytes() == pair[1].read_bytes()


class Stop(KeyboardInterrupt):
    pass


def test_stopped_anywhere_it_goes_on_and_ends_the_same(recovered, pair: Pair, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_S", 0.0)
    monkeypatch.setattr(teacher, "SAVE_S", 0.0)
    out, work, asked = tmp_path / "out.gguf", tmp_path / "work", []

    def progress(what: str, done: int, _total: int) -> None:
        asked.append((what, done))
        if len(asked) % 7 == 0:
            raise Stop

    for _ in range(20):
        try:
            facts = recover(*pair, WINDOWS, out, settings=QUICK, folder=work, progress=progress)
            break
        except Stop:
            assert not out.exists()
    else:
        pytest.fail("it never ends")
    assert facts == recovered[0]
    assert out.read_bytes() == recovered[1].read_bytes()
    taken = [done for what, done in asked if what == "recovering"]
    assert len(taken) < 2 * 36  # it did not begin anew each time


def test_what_was_stopped_once_the_file_was_there_is_not_trained_again(recovered, pair: Pair, tmp_path):
    asked = []
    for _ in range(2):
        asked.clear()
        facts = recover(
            *pair, WINDOWS, tmp_path / "out.gguf", settings=QUICK, folder=tmp_path,
            progress=lambda what, *_: asked.append(what),
        )  # fmt: skip
    assert "recovering" not in asked
    assert facts == recovered[0]
    assert (tmp_path / "out.gguf").read_bytes() == recovered[1].read_bytes()


def test_state_of_other_settings_is_not_gone_on_from(recovered, pair: Pair, tmp_path):
    def stop(what: str, done: int, _total: int) -> None:
        if what == "recovering" and done == 8:
            raise Stop

    other = dataclasses.replace(QUICK, seed=1)
    with pytest.raises(Stop):
        recover(*pair, WINDOWS, tmp_path / "out.gguf", settings=other, folder=tmp_path, progress=stop)
    assert (tmp_path / "training.pt").exists()
    assert recover(*pair, WINDOWS, tmp_path / "out.gguf", settings=QUICK, folder=tmp_path) == recovered[0]


def test_every_window_is_taken_once_before_any_is_taken_again():
    settings = Settings(batch=4)
    taken = np.concatenate([batch(step, 10, settings) for step in range(5)])
    for epoch in (taken[:10], taken[10:]):
        assert sorted(epoch) == list(range(10))
    assert list(taken[:10]) != list(taken[10:])


def test_the_rate_rises_and_then_falls_to_nearly_nothing():
    rates = [schedule(step, 40, 0.1) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[4:]))
    assert rates[-1] < 0.01


def test_a_model_of_another_vocabulary_is_refused(pair: Pair, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_decoders, "VOCABULARY", 124)
    other = tiny_decoders.write(tmp_path / "other.gguf", TIED)
    with pytest.raises(OtherVocabulary, match=r"predicts 120 tokens and .* 124"):
        recover(other, pair[1], WINDOWS, tmp_path / "out.gguf", folder=tmp_path)
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize(
    ("windows", "error", "words"),
    [
        (np.full((4, 8), 120), UnknownTokens, "token 120 and the model has 120"),
        (np.full((4, 8), -1), UnknownTokens, "token -1"),
        (WINDOWS[:1], TooFewWindows, "gives 1; raise --calibration-tokens"),
        (WINDOWS.astype(np.float32), UnusableWindows, r"\(240, 16\) float32"),
        (WINDOWS[0], UnusableWindows, r"not \(16,\)"),
        (WINDOWS[:, :1], UnusableWindows, "at least 2 tokens"),
    ],
)
def test_unusable_windows_are_refused_by_what_is_wrong(windows, error, words, pair: Pair, tmp_path):
    with pytest.raises(error, match=words):
        recover(*pair, windows, tmp_path / "out.gguf", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [("tokens", 0), ("batch", 0), ("scale_rate", -1.0), ("norm_rate", 2.0), ("norm_rate", math.nan),
     ("held_back", 0.0), ("held_back", 1.0), ("checks", 0), ("patience", 0), ("warm_up", 1.5)],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_by_name(name, value, pair: Pair, tmp_path):
    settings = dataclasses.replace(QUICK, **{name: value})
    with pytest.raises(QuantizeError, match=f"{name} is {value}"):
        recover(*pair, WINDOWS, tmp_path / "out.gguf", settings=settings, folder=tmp_path)


def test_too_little_memory_is_refused_with_the_memory_needed(pair: Pair, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: 10**6)
    with pytest.raises(NoMemory, match=r"needs about 0\.\d GB of memory \(.*\), and 0\.0 GB are free"):
        recover(*pair, WINDOWS, tmp_path / "out.gguf", folder=tmp_path)


def test_layers_are_computed_again_where_that_alone_fits(pair: Pair, monkeypatch):
    header = read_header(pair[1])
    kept, lean = (memory.needed(header, training.TOKENS, lean=lean) for lean in (False, True))
    assert lean < kept
    network = Network.open(pair[0])
    beside = 4 * WINDOWS.size * tiny_decoders.WIDTH + 4 * tiny_decoders.VOCABULARY * tiny_decoders.WIDTH
    for free, expected in ((kept, False), (kept - 1, True), (lean, True)):
        monkeypatch.setattr(memory, "free_memory", lambda _, free=free: (free + beside) / memory.SHARE + 1)
        assert memory.is_lean(network, pair[1], WINDOWS, "cpu") == expected


def test_infinite_scales_are_refused_by_the_tensors_name(pair: Pair, tmp_path):
    broken = tmp_path / "broken.gguf"
    data = bytearray(pair[1].read_bytes())
    tensor = next(t for t in read_header(pair[1]).tensors if t.name == "blk.1.ffn_up.weight")
    data[tensor.offset : tensor.offset + 2] = np.array(np.inf, np.float16).tobytes()
    broken.write_bytes(data)
    with pytest.raises(BrokenScales, match=r"blk\.1\.ffn_up\.weight holds NaN or infinity"):
        recover(pair[0], broken, WINDOWS, tmp_path / "out.gguf", folder=tmp_path)


def test_a_file_with_nothing_to_train_is_refused(pair: Pair, monkeypatch):
    monkeypatch.setattr(Student, "_prepare", lambda *_: None)
    with pytest.raises(NothingToTrain, match="nothing to recover with"):
        Student(pair[1])
