"""What the pipeline makes of sources that lack something: refused before work, or told in the report."""

import dataclasses
import json
from pathlib import Path

import pytest

from engine.sampling import NotANumber
from models.atomic import partial_name
from models.errors import ModelsError
from models.store import Store
from quantize.calibration import steps, texts
from quantize.calibration.calibrate import NoUsableText
from quantize.families.supported import UnsupportedArchitecture
from quantize.frame import CannotConverse
from quantize.pipeline import run
from quantize.settings import Settings
from quantize.source import UnusableSource, digest, find


@pytest.fixture
def mute(asked, checkpoint) -> Settings:
    """The same run of a model whose chat template cannot frame a conversation."""
    (checkpoint / "chat_template.jinja").write_text("always the same")
    source = dataclasses.replace(asked.source, path=checkpoint)
    return dataclasses.replace(asked, source=source, types=("Q4_0",))


ALICE = Path(__file__).parent / "golden" / "alice.txt"


@pytest.mark.parametrize(
    "change",
    [{}, {"calibration": "none"}, {"calibration": ALICE}, {"eval_text": ALICE}],
    ids=["self", "none", "file", "self with a text to measure on"],
)
def test_a_model_that_cannot_converse_is_told_so_before_anything_is_made(change, mute, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(CannotConverse, match=r"does not print the user's message.*--eval-text FILE"):
        run(dataclasses.replace(mute, out=out, **change))
    assert not out.exists()


def test_a_model_that_cannot_converse_is_measured_on_a_text_alone(mute, made, tmp_path):
    settings = dataclasses.replace(mute, calibration="none", eval_text=ALICE, out=tmp_path / "out")
    report = run(settings)
    assert report.evaluation is None
    assert report.files[0].chats is None
    assert report.files[0].text is not None
    assert report.files[0].text.kl.mean > 0
    assert "divergence is measured on alice.txt alone" in report.warnings[0]
    assert not {"generator", "evaluation"} & set(made)
    card = (settings.out / "report.md").read_text("utf-8")
    assert "does not print the user's message: there are no held-out conversations" in card
    assert card.count("| type | MB |") == 1


def test_a_model_that_turns_out_to_write_nothing_usable_is_measured_on_the_text(
    asked, monkeypatch, tmp_path, made
):
    def nothing(*_, **__):
        raise NoUsableText({"empty question": 200})

    monkeypatch.setattr(steps, "write_conversations", nothing)
    settings = dataclasses.replace(asked, calibration="none", types=("Q4_0",), out=tmp_path / "out")
    with pytest.raises(NoUsableText, match="--eval-text"):
        run(settings)
    assert "quantize-Q4_0" not in made
    report = run(dataclasses.replace(settings, eval_text=ALICE))
    assert "200 empty question" in report.warnings[0]
    assert report.files[0].text is not None


def test_a_generator_that_overflows_is_told_as_a_model_that_cannot_converse(asked, monkeypatch, tmp_path):
    def overflows(*_, **__):
        raise NotANumber

    monkeypatch.setattr(texts, "converse", overflows)
    settings = dataclasses.replace(asked, calibration="none", types=("Q4_0",), out=tmp_path / "out")
    with pytest.raises(CannotConverse, match=r"as Q8_0 the model computes NaN.*--eval-text FILE"):
        run(settings)
    report = run(dataclasses.replace(settings, eval_text=ALICE))
    assert "computes NaN" in report.warnings[0]


def test_what_cannot_be_converted_is_refused_before_the_folder_is_made(asked, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "architectures": ["MixtralForCausalLM"]}))
    source, out = dataclasses.replace(asked.source, path=checkpoint), tmp_path / "out"
    with pytest.raises(UnsupportedArchitecture, match="MixtralForCausalLM"):
        run(dataclasses.replace(asked, source=source, out=out))
    with pytest.raises(ModelsError, match="adapter_config"):
        run(dataclasses.replace(asked, adapter=tmp_path, out=out))
    assert not out.exists()


def test_what_a_conversion_must_say_is_in_the_report(asked, checkpoint, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"architectures": ["MistralForCausalLM"], "sliding_window": 128}
    (checkpoint / "config.json").write_text(json.dumps(config))
    settings = dataclasses.replace(
        asked,
        source=dataclasses.replace(asked.source, path=checkpoint),
        types=("Q4_0",),
        calibration="none",
        out=tmp_path / "out",
    )
    assert any("a window of 128 tokens" in warning for warning in run(settings).warnings)
    assert "a window of 128 tokens" in (settings.out / "report.md").read_text("utf-8")


def test_the_checkpoints_own_folder_may_hold_the_results_and_a_rerun_does_nothing(asked, checkpoint, made):
    source = dataclasses.replace(asked.source, path=checkpoint)
    settings = dataclasses.replace(
        asked, source=source, out=checkpoint, types=("Q4_0",), calibration="none", eval_text=ALICE
    )
    run(settings)
    assert "source" in made
    made.clear()
    run(settings)
    assert made == []


def test_what_a_conversion_reads_changes_the_digest_and_nothing_else_does(checkpoint):
    seen = {digest(checkpoint)}
    (checkpoint / "imatrix.gguf").write_bytes(b"x")
    (checkpoint / "report.md").write_text("x")
    (checkpoint / "training.py").write_text("x")
    assert digest(checkpoint) in seen
    (checkpoint / "additional_chat_templates").mkdir()
    for name in ("README.md", "generation_config.json", "additional_chat_templates/tools.jinja"):
        (checkpoint / name).write_text("{}")
        assert digest(checkpoint) not in seen, name
        seen.add(digest(checkpoint))
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    assert digest(checkpoint) not in seen


def test_files_of_other_programs_are_left_alone(asked, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / ".rsync-of-mine.partial").write_text("precious")
    left = out / f"{partial_name('tiny-Q4_0.gguf')}"
    left.write_text("by a run that was killed")
    run(dataclasses.replace(asked, out=out, types=("Q4_0",), calibration="none"))
    assert (out / ".rsync-of-mine.partial").read_text() == "precious"
    assert not left.exists()


@pytest.mark.parametrize(
    ("origin", "base"),
    [
        ("hf:org/x", "org/x"),
        ("hf:org/x@v1", "org/x"),
        ("hf:org/x-GGUF:BF16", "org/x-GGUF"),
        ("hf:org/x/F16.gguf@main", "org/x"),
        ("file:/somewhere/x", None),
    ],
)
def test_the_base_model_is_a_repository(origin, base, asked, tmp_path):
    store = Store(tmp_path / "home")
    store.add(asked.source.path, name="x", source=origin)
    assert find("x", store=store).base_model == base


def test_a_reference_whose_name_is_taken_says_how_to_store_it(asked, tmp_path):
    store = Store(tmp_path / "home")
    store.add(asked.source.path, name="x")
    with pytest.raises(UnusableSource, match=r"already, from file:.*`lq pull hf:org/x --name N`"):
        find("hf:org/x", store=store)
