"""Files within a budget, from checkpoint to report: what they hold, what a second run takes over."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from unittest import mock

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from models.store import Store
from quantize.calibration.conversation import read
from quantize.divergence import TokenScores
from quantize.errors import QuantizeError
from quantize.gguf_files import mixed_file
from quantize.measure import Backend
from quantize.mixes import steps, workshop
from quantize.mixes.allocate import Mix
from quantize.mixes.budget import FIT, Budget, InvalidBudget, parse_bits_per_weight, parse_sizes
from quantize.mixes.judging import PIECE, pieces, ratio, typical
from quantize.mixes.workshop import WINDOW, Workshop
from quantize.network.stream import cut
from quantize.pipeline import run
from quantize.rounding import kernels
from quantize.settings import NeedsCalibration
from quantize.source import UnusableSource, digest, find

SMALL, LARGE = "3.4MB", "4.4MB"


@pytest.fixture(scope="module")
def wanted(asked):
    """Two budgets and no type."""
    return dataclasses.replace(asked, types=(), budgets=parse_sizes(f"{SMALL},{LARGE}"))


@pytest.fixture(scope="module")
def finished(wanted, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("mixes")
    run(dataclasses.replace(wanted, out=out, command="lq quantize tiny"))
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def test_files_are_just_below_their_budgets(finished):
    # two matrices of this model are half of it each, so that steps are large
    for label, size in ((SMALL, 3_400_000), (LARGE, 4_400_000)):
        assert 0.99 * size <= (finished / f"tiny-{label}.gguf").stat().st_size <= size


def test_what_the_mix_says_is_what_the_file_holds(finished):
    for label in (SMALL, LARGE):
        mix = json.loads((finished / "work" / f"mix-{label}.json").read_text("utf-8"))["types"]
        held = {t.name: t.tensor_type.name for t in gguf.GGUFReader(finished / f"tiny-{label}.gguf").tensors}
        assert mix
        assert {name: held[name] for name in mix} == mix
        assert len(set(mix.values())) > 1


def test_more_bytes_diverge_less(finished):
    small, large = json.loads((finished / "report.json").read_text("utf-8"))["files"]
    assert 0 < large["chats"]["kl"]["mean"] < small["chats"]["kl"]["mean"]


def test_layers_are_rounded_in_order_and_the_closer_file_is_kept(finished):
    for file in json.loads((finished / "report.json").read_text("utf-8"))["files"]:
        alone, in_order = file["mix"]["compared"]
        assert 0 < in_order != alone > 0
    told = "Layers were then rounded in their order"
    assert (finished / "report.md").read_text("utf-8").count(told) == 2


def test_layers_rounded_in_order_are_not_used_where_they_are_no_closer(copy, wanted, monkeypatch):
    budgets = parse_bits_per_weight("5")
    judged = itertools.count(1)  # the mixes, and last the best of them with its layers in order
    monkeypatch.setattr(Workshop, "judge", lambda _, path: [path.exists() * next(judged)])
    report = run(dataclasses.replace(wanted, out=copy, budgets=budgets))
    assert report.files[0].mix is not None
    alone, in_order = report.files[0].mix.compared
    assert alone == 1 < in_order
    assert "so that was not used" in (copy / "report.md").read_text("utf-8")


def test_nothing_large_is_left_and_sensitivities_are(finished):
    left = {path.name for path in (finished / "work").iterdir()}
    assert not left & {"hessians", "parts", "tries", "gains", "in-order", "generator.gguf"}
    assert "sensitivities.npz" in left


def test_same_run_again_does_nothing(copy, wanted, made):
    run(dataclasses.replace(wanted, out=copy))
    assert made == []


@pytest.mark.parametrize("found", [True, False])
def test_report_says_where_rounding_had_no_compiled_loops(copy, wanted, monkeypatch, found):
    if not found:
        monkeypatch.setattr(kernels, "library_path", lambda: copy / "librounding.so")
        monkeypatch.setattr(kernels, "are_there", kernels.are_there.__wrapped__)
    report = run(dataclasses.replace(wanted, out=copy))
    said = [warning for warning in report.warnings if "install lq anew where a C++ compiler is" in warning]
    assert len(said) == (not found)


def test_another_budget_takes_over_sensitivities(copy, wanted, made):
    budgets = (*wanted.budgets, *parse_bits_per_weight("5"))
    run(dataclasses.replace(wanted, out=copy, budgets=budgets))
    assert {"mix-5bpw", "hessians", "quantize-5bpw"} <= set(made)
    assert not {"sensitivities", "importance", f"mix-{SMALL}", f"quantize-{LARGE}"} & set(made)
    tensors = gguf.GGUFReader(copy / "tiny-5bpw.gguf").tensors
    bits = 8 * sum(int(t.n_bytes) for t in tensors) / sum(int(t.n_elements) for t in tensors)
    assert 4.8 <= bits <= 5


def test_budget_that_no_mix_keeps_is_refused_before_anything_takes_long(wanted, tmp_path, made):
    budgets = (*wanted.budgets, *parse_sizes("500KB"))
    with pytest.raises(InvalidBudget, match=r"500KB is too small: .* the smallest file has \d+"):
        run(dataclasses.replace(wanted, out=tmp_path, budgets=budgets))
    assert not {"text", "calibration", "sensitivities"} & set(made)


def test_quantized_source_has_no_budget(finished, wanted, tmp_path):
    source = find(str(finished / f"tiny-{LARGE}.gguf"), store=Store(tmp_path))
    settings = dataclasses.replace(wanted, source=source, out=tmp_path / "out", allow_requantize=True)
    with pytest.raises(UnusableSource, match=r"already, and budgets and --explore .* --types alone"):
        run(settings)


def test_faster_runner_up_wins_by_what_its_time_is_worth():
    """Of mixes that measure about the same the objective decides, not the noise."""
    best = Mix({"a": "Q4_0"}, 10, 0.10, 4.0)
    slow = Mix({"a": "Q5_0"}, 10, 0.11, 9.0)
    measured = [0.102, 0.101]
    assert steps.chosen([best, slow], measured, weight=0.0) == 1
    assert steps.chosen([best, slow], measured, weight=0.001) == 0


def test_budget_needs_a_text_to_measure_by(wanted, tmp_path):
    with pytest.raises(NeedsCalibration, match="--calibration none gives no text"):
        run(dataclasses.replace(wanted, out=tmp_path, calibration="none"))


def test_objective_without_a_budget_is_refused(asked, tmp_path):
    with pytest.raises(QuantizeError, match="--objective speed chooses among mixes, and no budget is given"):
        run(dataclasses.replace(asked, out=tmp_path, objective="speed"))


def test_budget_larger_than_everything_is_the_largest_type(copy, wanted):
    run(dataclasses.replace(wanted, out=copy, budgets=(Budget("1GB", file_bytes=10**9),)))
    mix = json.loads((copy / "work" / "mix-1GB.json").read_text("utf-8"))["types"]
    assert set(mix.values()) == {"Q8_0"}


def test_tensors_of_16_bits_may_stay_as_they_are_but_not_because_memory_is_large(wanted, tmp_path):
    folder = Path(shutil.copytree(wanted.source.path, tmp_path / "half"))
    file = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file)
    source = find(str(folder), store=Store(tmp_path / "store"))
    budgets = (*parse_sizes("6.2MB,1GB"), FIT)
    run(dataclasses.replace(wanted, source=source, out=tmp_path / "out", budgets=budgets))
    found = {}
    for budget in budgets:
        mix = json.loads((tmp_path / "out" / "work" / f"mix-{budget.label}.json").read_text("utf-8"))["types"]
        (path,) = (tmp_path / "out").glob(f"*-{budget.label}.gguf")
        held = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        assert {name: held[name].tensor_type.name for name in mix} == mix
        found[budget.label] = set(mix.values())
    assert {"BF16", "Q8_0"} <= found["6.2MB"]
    assert found["1GB"] == {"BF16"}
    assert "Q8_0" in found["fit"]
    sizes = [(held[name].n_bytes, held[name].n_elements * 34 // 32) for name in mix]
    assert 0.8 < sum(ours for ours, _ in sizes) / sum(eight_bits for _, eight_bits in sizes) <= 1


def test_processes_side_by_side_make_the_same_files(finished, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(mixed_file, "LEAST_TO_SHARE", 0)
    run(dataclasses.replace(wanted, out=tmp_path, budgets=wanted.budgets[:1], backend=Backend(2)))
    assert digest(finished / f"tiny-{SMALL}.gguf") == digest(tmp_path / f"tiny-{SMALL}.gguf")
    losses = [
        json.loads((folder / "report.json").read_text("utf-8"))["files"] for folder in (finished, tmp_path)
    ]
    assert losses[0][0]["mix"] == losses[1][0]["mix"]
    assert 0 < losses[0][0]["mix"]["rounding_loss"] < 1


@pytest.fixture
def measured_on(monkeypatch) -> list:
    """The windows that sensitivities and Hessians of a run would be of; it stops there."""
    found = []

    def measure(_network, windows, *_, **__):
        found.append(windows)
        raise KeyboardInterrupt

    monkeypatch.setattr(steps, "measure_sensitivities", measure)
    return found


def texts_of(run_folder: Path) -> list[list[int]]:
    return [list(text.tokens) for text in read(run_folder / "work" / "calibration.jsonl")]


def test_what_files_are_compared_on_has_no_part_in_their_hessians(wanted, tmp_path, monkeypatch, measured_on):
    compared, plain = [], Workshop.unseen
    monkeypatch.setattr(Workshop, "unseen", lambda shop: compared.extend(shop.compared) or plain(shop))
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(wanted, out=tmp_path, calibration_tokens=3000))
    held_back = [text.tokens for text in compared if len(text.tokens) >= WINDOW]
    pieces = {tuple(text[i : i + WINDOW]) for text in held_back for i in range(len(text) - WINDOW + 1)}
    assert pieces
    assert not pieces & {tuple(window) for window in measured_on[0].tolist()}
    assert len(measured_on[0]) >= workshop.MOST * len(cut(texts_of(tmp_path), WINDOW))


def test_short_text_is_not_halved_for_what_files_are_compared_on(wanted, tmp_path, monkeypatch, measured_on):
    plain = Workshop.unseen
    monkeypatch.setattr(Workshop, "unseen", lambda shop: plain(shop)[:1])
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(wanted, out=tmp_path))
    assert len(measured_on[0]) == len(cut(texts_of(tmp_path), WINDOW)) > 1


def test_text_at_which_a_file_stumbles_does_not_choose_between_files(tmp_path, monkeypatch):
    kl = np.random.default_rng(1).gamma(1, 0.01, (2, 10 * PIECE))
    kl[1] = 0.9 * kl[0]
    kl[1, 70:90] = 15.0  # closer, but for a piece
    scores = iter(kl)
    n_fields = len(dataclasses.fields(TokenScores))
    monkeypatch.setattr(workshop, "token_scores", lambda *_, **__: [TokenScores(*[next(scores)] * n_fields)])
    monkeypatch.setattr(workshop, "write_reference", lambda *_, **__: None)
    shop = mock.Mock(tries=tmp_path, key="k", compared=[])
    plain, stumbling = (Workshop.judge(shop, tmp_path / "file.gguf") for _ in range(2))
    assert np.mean(stumbling) > 2 * np.mean(plain)
    assert ratio(stumbling, plain) == pytest.approx(0.9)


def test_pieces_are_of_all_tokens_and_a_file_that_is_its_source_can_be_compared():
    kl = np.random.default_rng(2).gamma(1, 0.01, 3 * PIECE + 5)
    found = pieces(kl)
    assert len(found) == 3
    assert np.average(found, weights=[66, 66, 65]) == pytest.approx(kl.mean())
    assert pieces(np.array([0.25, 15.5])) == [0.625]
    assert ratio([0.0], [0.0]) == 1.0


def test_a_kind_of_text_that_makes_up_a_third_still_counts():
    over = np.random.default_rng(3).gamma(9, 0.001, 30)
    judged = over * np.where(np.arange(30) % 3 == 0, 1.5, 0.97)
    assert ratio(judged.tolist(), over.tolist()) > 1
    files = [over.tolist(), judged.tolist(), (0.8 * over).tolist()]
    plain, worse, best = typical(files)
    assert best < plain < worse
    assert best / plain == pytest.approx(0.8)
    assert typical(files[:1]) == pytest.approx([over.mean()])
