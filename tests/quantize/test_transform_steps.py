"""A run that tries transforms: the files come from the changed source, divergence is to the unchanged one."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantize.errors import QuantizeError
from quantize.measure import Backend
from quantize.mixes.budget import parse_sizes
from quantize.pipeline import run
from quantize.steps import Step
from quantize.transforms import explore as exploring
from quantize.transforms import kinds
from quantize.transforms.explore import Exploration
from quantize.transforms.steps import Request, TooFewTexts, Transforms

USED = ["scale-inner", "biases"]


@pytest.fixture(scope="module")
def wanted(asked):
    return dataclasses.replace(asked, types=("Q4_0",), explore="Q4_0")


def use(patch: pytest.MonkeyPatch) -> None:
    """Let two of the transforms be all there are, and pay whatever they gain, so that files show them."""
    every = kinds.transforms

    def known(*arguments, **options):
        return tuple(each for each in every(*arguments, **options) if each.name in USED)

    patch.setattr("quantize.transforms.steps.transforms", known)
    patch.setattr(exploring, "pays", lambda *_: True)


@pytest.fixture(scope="module")
def finished(wanted, tmp_path_factory) -> Path:
    """The folder of a run that uses them."""
    out = tmp_path_factory.mktemp("explored")
    with pytest.MonkeyPatch.context() as patch:
        use(patch)
        run(dataclasses.replace(wanted, out=out))
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_report_tells_what_each_transform_gave(finished):
    trials = json.loads((finished / "report.json").read_text("utf-8"))["transforms"]
    names = {trial["name"] for trial in trials if trial["used"]}
    assert {"scale-inner", "biases"} <= names
    assert any(" + " in name for name in names)
    for trial in trials:
        assert (trial["kl"] is None) == (trial["refused"] is not None)
        if trial["gain"]:
            assert 0 <= trial["largest_kl"] < 1e-5
            assert trial["gain"]["standard_error"] > 0
    card = (finished / "report.md").read_text("utf-8")
    assert "## Transforms tried" in card
    assert "scale-inner" in card


def test_files_are_made_from_the_changed_source(finished):
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(finished / "tiny-Q4_0.gguf").tensors}
    bias = tensors["blk.1.ffn_down.bias"]
    assert np.abs(bias.data).max() > 0  # corrected
    assert "blk.1.attn_q.bias" in tensors
    report = json.loads((finished / "report.json").read_text("utf-8"))
    assert report["files"][0]["chats"]["kl"]["mean"] > 0


def test_nothing_large_is_left(finished):
    left = {path.name for path in (finished / "work" / "transforms").iterdir()}
    assert left == {"used.json", "imatrix.gguf", "means.safetensors"}


def test_same_run_again_does_nothing(copy, wanted, made):
    run(dataclasses.replace(wanted, out=copy))
    assert made == []


def test_another_type_is_made_from_the_same_changed_source(copy, wanted, made):
    run(dataclasses.replace(wanted, out=copy, types=("Q4_0", "Q5_0")))
    assert {"transformed", "quantize-Q5_0"} <= set(made)
    assert not {"exploration", "quantize-Q4_0", "importance"} & set(made)
    names = [tensor.name for tensor in gguf.GGUFReader(copy / "tiny-Q5_0.gguf").tensors]
    assert "blk.0.attn_v.bias" in names


def test_budget_counts_the_biases_and_keeps_them(copy, wanted, monkeypatch):
    def biases_alone(source, *_, rounding):
        assert rounding == "best"
        return Exploration((), source.then(kinds.Biases().fold(source)))

    monkeypatch.setattr("quantize.transforms.steps.explore", biases_alone)
    run(dataclasses.replace(wanted, out=copy, types=(), budgets=parse_sizes("4.4MB")))
    path = copy / "tiny-4.4MB.gguf"
    assert 0.9 * 4_400_000 <= path.stat().st_size <= 4_400_000
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert np.abs(tensors["blk.1.ffn_down.bias"].data).max() > 0


def test_where_nothing_pays_files_are_those_of_a_run_without(copy, wanted, monkeypatch, tmp_path):
    monkeypatch.setattr("quantize.transforms.steps.explore", lambda source, *_, **__: Exploration((), source))
    run(dataclasses.replace(wanted, out=copy, explore="Q5_0"))
    plain = tmp_path / "plain"
    shutil.copytree(copy, plain)
    run(dataclasses.replace(wanted, out=plain, explore=None))
    assert (copy / "tiny-Q4_0.gguf").read_bytes() == (plain / "tiny-Q4_0.gguf").read_bytes()


@pytest.mark.parametrize(("n_texts", "n_held_back"), [(4, 2), (9, 2), (20, 4)])
def test_some_texts_are_held_back_and_moments_come_from_the_others(n_texts, n_held_back, tmp_path):
    steps = stepping(tmp_path, n_texts)
    held_back = {each.number for each in steps._conversations(held_back=True)}
    others = {each.number for each in steps._conversations(held_back=False)}
    assert len(held_back) == n_held_back
    assert held_back | others == set(range(n_texts))
    assert not held_back & others


def test_too_few_texts_to_hold_some_back_are_refused(tmp_path):
    with pytest.raises(TooFewTexts, match="there are 3; give --calibration-tokens enough for 4"):
        stepping(tmp_path, 3)._conversations(held_back=True)


def stepping(folder: Path, n_texts: int) -> Transforms:
    """Steps over so many texts, of which none has run."""
    texts = [{"key": "any"}] + [
        {
            "number": i,
            "seed": 0,
            "temperature": 1.0,
            "tokens": [1, 2],
            "spans": [{"role": "text", "n_tokens": 2}],
        }
        for i in range(n_texts)
    ]
    path = folder / "calibration.jsonl"
    path.write_text("".join(json.dumps(text) + "\n" for text in texts), "utf-8")
    silent = lambda *_: None  # noqa: E731
    request = Request(path, folder, path, path, "Q4_0", "nearest", "text", 0, Backend(), silent)
    step = Step("any", dict, {})
    return Transforms(request, (step, step, step))


def test_exploring_needs_a_text(wanted, tmp_path):
    with pytest.raises(QuantizeError, match="--explore tries transforms on calibration text"):
        run(dataclasses.replace(wanted, out=tmp_path, calibration="none"))
