"""Recovery as steps of a run: stopped it goes on, what does not help is left, and the report tells both."""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json

import pytest

from quantize import work
from quantize.calibration.conversation import read
from quantize.mixes.budget import parse_bits_per_weight
from quantize.network.shape import UnsupportedNetwork
from quantize.pipeline import run
from quantize.recovery.steps import Recoveries
from quantize.recovery.training import Settings
from quantize.settings import NeedsText, silent
from quantize.source import Source
from quantize.work import Work
from tests.quantize import tiny_decoders


@pytest.fixture
def recovering(asked, tmp_path, monkeypatch):
    """Settings of a run with a short training."""
    quick = Settings(tokens=1536, batch=1, checks=3, scale_rate=3e-3, norm_rate=3e-3)
    monkeypatch.setattr(work, "Recoveries", functools.partial(Recoveries, settings=quick))
    return dataclasses.replace(asked, out=tmp_path / "out", types=("Q4_0",), recover=True)


def digest(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_recovered_and_told_of_once_the_run_is_gone_on_with(recovering, made):
    class Stop(KeyboardInterrupt):
        pass

    def stop(what: str, done: int, _total: int | None) -> None:
        if what.startswith("recovering Q4_0") and done == 2:
            raise Stop

    out = recovering.out
    with contextlib.suppress(Stop):
        run(recovering, progress=stop)
    assert "quantize-Q4_0" in made
    assert "recovered-Q4_0" not in made
    assert not (out / "tiny-Q4_0.gguf").exists()
    report = run(recovering)
    assert made.count("quantize-Q4_0") == made.count("recovered-Q4_0") == 1
    (file,) = report.files
    recovery = file.recovery
    assert recovery is not None
    assert recovery.kept
    assert recovery.trained.after < recovery.trained.before
    assert recovery.judged[1].mean < recovery.judged[0].mean
    assert file.chats is not None
    assert recovery.chats_before is not None
    assert file.chats.kl.mean != recovery.chats_before.kl.mean
    assert file.sha256 == digest(out / "tiny-Q4_0.gguf") != made_before(out)
    assert not [path for path in (out / "work").rglob("*") if path.suffix in (".gguf", ".pt", ".safetensors")]
    stored = json.loads((out / "report.json").read_text("utf-8"))["files"][0]["recovery"]
    assert stored["kept"] is True
    assert stored["chats_before"]["kl"]["mean"] == recovery.chats_before.kl.mean
    assert "## Recovered" in (out / "report.md").read_text("utf-8")
    texts = [
        {tuple(text.tokens) for text in read(out / "work" / f"{name}.jsonl")}
        for name in ("calibration", "evaluation", "recovery")
    ]
    assert all(texts)
    assert not any(one & other for one, other in itertools.combinations(texts, 2))
    done = list(made)
    run(recovering)
    assert made == done


def test_a_text_of_the_users_own_is_what_recovery_learns_from(recovering, tmp_path):
    text = tmp_path / "own.txt"
    text.write_text("word " * 4000, "utf-8")
    settings = dataclasses.replace(recovering, calibration=text)
    job = Work(settings, settings.check(), silent)
    assert job.texts.lessons is job.texts.calibration
    assert job.recoveries.texts == job.texts.file("calibration")


def made_before(out) -> str:
    """The hash of the file as it was rounded."""
    return json.loads((out / "work" / "steps" / "quantize-Q4_0.json").read_text("utf-8"))["facts"]["sha256"]


def test_a_file_whose_divergence_does_not_fall_is_left_as_it_was_and_the_report_says_so(
    recovering, monkeypatch
):
    worse = [{"mean": mean, "standard_error": 0.01} for mean in (0.5, 0.5)]
    monkeypatch.setattr(Recoveries, "_judge", lambda *_: worse)
    report = run(recovering)
    (file,) = report.files
    assert file.recovery is not None
    assert not file.recovery.kept
    assert file.sha256 == digest(recovering.out / "tiny-Q4_0.gguf") == made_before(recovering.out)
    assert file.chats == file.recovery.chats_before
    said = "Q4_0: training did not lower the divergence"
    assert [warning for warning in report.warnings if warning.startswith(said)]
    assert said in (recovering.out / "report.md").read_text("utf-8")


def test_what_is_rounded_within_a_budget_is_recovered_too(recovering):
    settings = dataclasses.replace(recovering, types=(), budgets=parse_bits_per_weight("5"))
    steps = {step.name: step for step in Work(settings, settings.check(), silent).steps()}
    step = steps["recovered-5bpw"]
    assert step.outputs == (settings.out / "tiny-5bpw.gguf",)
    rounded = step.needs[-1]
    assert rounded.name == "quantize-5bpw"
    assert rounded.needs[0].name == "mix-5bpw"
    assert rounded.outputs == (settings.out / "work" / "rounded-5bpw.gguf",)
    assert steps["divergence-evaluation-5bpw"].needs[-1].name == "recovered-5bpw"
    assert steps["divergence-evaluation-rounded-5bpw"].needs[-1].name == "quantize-5bpw"


def test_without_a_text_there_is_nothing_to_train_on(recovering):
    with pytest.raises(NeedsText, match=r"--calibration none .* --recover"):
        run(dataclasses.replace(recovering, calibration="none"))
    assert not recovering.out.exists()


def test_a_model_without_gradients_is_refused_before_any_work(recovering, tmp_path, monkeypatch):
    monkeypatch.setitem(tiny_decoders.VARIANTS, "other", ("starcoder2", {}, {}))
    path = tiny_decoders.write(tmp_path / "other.gguf", "other")
    settings = dataclasses.replace(recovering, source=Source("other", "gguf", path, "other"))
    with pytest.raises(UnsupportedNetwork, match="'starcoder2' is not implemented"):
        run(settings)
    assert not recovering.out.exists()
