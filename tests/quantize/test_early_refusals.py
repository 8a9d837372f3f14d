"""What cannot work is refused before minutes of work: before the source is fetched, or before a step runs."""

import dataclasses
from collections import namedtuple
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lq.commands import quantize as command
from models.errors import ModelsError
from models.store import NameTaken, Store
from quantize import room, source
from quantize.calibration.texts import UnusableText
from quantize.describe import Description, describe_checkpoint, describe_gguf
from quantize.errors import QuantizeError
from quantize.gguf_files.types import FTYPES
from quantize.pipeline import run
from quantize.room import NoRoom, least_bytes
from tests import tiny_models

Usage = namedtuple("Usage", "total used free")
ALICE = Path(__file__).parent / "golden" / "alice.txt"


@pytest.fixture
def lq(tmp_path, monkeypatch):
    """A function: options -> runs `lq quantize hf:org/model`; whatever is fetched for it is a failure."""
    monkeypatch.setenv("LQ_HOME", str(tmp_path / "home"))

    def fetched(*_args, **_options):
        raise AssertionError("the source was looked for")

    monkeypatch.setattr(source, "find", fetched)
    app = typer.Typer()
    command.register(app)

    def invoke(*options: object) -> None:
        result = CliRunner().invoke(
            app, ["hf:org/model", "--out", str(tmp_path / "out"), *map(str, options)], catch_exceptions=False
        )
        pytest.fail(f"it was accepted: {result.output}")

    return invoke


REFUSALS = {
    "type": (("--types", "Q4_KM"), "not a quantization type"),
    "matrix": (("--types", "IQ2_XXS", "--calibration", "none"), "needs an importance matrix"),
    "seed": (("--seed", -1), "--seed is -1"),
    "few tokens": (("--eval-tokens", 3), "--eval-tokens is 3"),
    "threads": (("--threads", 100000), "--threads is 100000; give a number from 1 to 512"),
    "name": (("--name", "../x"), "is not a file name"),
    "rule": (("--pre", "qwen9"), "--pre qwen9 is no rule"),
    "no file": (("--calibration", "self,"), "name the text file after the comma"),
    "transform's type": (("--explore", "Q4_K_M"), "--explore is 'Q4_K_M', no tensor type; give one"),
    "adapter": (("--lora", "no-such-adapter"), "no model named 'no-such-adapter'"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_option_that_cannot_work_is_refused_before_the_source_is_fetched(name, lq, tmp_path):
    options, reason = REFUSALS[name]
    with pytest.raises((QuantizeError, ModelsError), match=reason):
        lq(*options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["--eval-text ", "--calibration ", "--calibration self,"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"\xff\xfe" * 500, "binary"), (b"short", "has only 5 bytes")],
)
def test_a_text_that_cannot_be_used_is_refused_before_the_source_is_fetched(
    option, content, reason, lq, tmp_path
):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(UnusableText, match=reason):
        lq(*f"{option}{text}".split(" ", 1))
    with pytest.raises(UnusableText, match=r"nowhere\.txt: it cannot be read"):
        lq(*f"{option}{tmp_path}/nowhere.txt".split(" ", 1))


def test_an_adapter_that_cannot_be_merged_is_refused_before_the_source_is_fetched(lq, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(ModelsError, match="peft_type"):
        lq("--lora", tmp_path / "adapter")


def test_an_out_that_is_a_file_is_refused_before_the_source_is_fetched(lq, tmp_path):
    (tmp_path / "file").write_text("precious")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(QuantizeError, match=r"--out .*file is a file; give a folder"):
            lq("--out", out)
    assert (tmp_path / "file").read_text() == "precious"


def test_an_encoder_is_refused_before_any_work(asked, made, tmp_path):
    """Measured as a model that writes it would end the process."""
    path = tiny_models.bert(tmp_path / "encoder.gguf")
    found = source.find(str(path), store=Store(tmp_path / "home"))
    with pytest.raises(source.UnusableSource, match="it is an encoder"):
        run(dataclasses.replace(asked, source=source.named(found, "encoder"), out=tmp_path / "out"))
    assert made == []


def test_a_name_that_the_store_holds_already_is_refused_before_any_work(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("LQ_HOME", str(tmp_path / "home"))
    store = Store(tmp_path / "home")
    store.add(tiny_llama.path, name="mine-q8_0", source="made elsewhere")
    out, app = tmp_path / "out", typer.Typer()
    command.register(app)
    words = [str(tiny_llama.path), "--out", str(out), "--name", "Mine", "--types", "Q8_0", "--store"]
    with pytest.raises(NameTaken, match=r"already holds 'mine-q8_0', from made elsewhere.*--name"):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not out.exists()


def test_a_text_of_too_few_tokens_is_refused_before_the_model_writes_any(asked, made, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 30)
    settings = dataclasses.replace(asked, eval_text=text, out=tmp_path / "out")
    with pytest.raises(UnusableText, match=r"it has only \d+ tokens"):
        run(settings)
    assert set(made) == {"source", "description"}


@pytest.fixture
def free(monkeypatch):
    """A function: pretends that so many bytes are free."""

    def pretend(size: int) -> None:
        monkeypatch.setattr(room.shutil, "disk_usage", lambda _path: Usage(0, 0, size))

    return pretend


def test_a_disk_too_small_for_the_files_is_told_with_sizes_before_any_step(asked, made, free, tmp_path):
    description = describe_checkpoint(asked.source.path)
    needed = sum(least_bytes(kind, description) for kind in asked.types)
    free(needed)
    with pytest.raises(NoRoom, match=r"\(source \d+ MB, .*are free; make room.*--types.*--eval-tokens"):
        run(dataclasses.replace(asked, out=tmp_path / "out"))
    assert made == []


def test_a_finished_run_needs_no_room_to_say_so_again(asked, made, free, tmp_path):
    settings = dataclasses.replace(asked, types=("Q4_0",), calibration="none", out=tmp_path / "out")
    run(settings)
    made.clear()
    free(1)
    run(settings)
    assert made == []
    with pytest.raises(NoRoom, match=r"quantize-Q8_0 \d+ MB"):
        run(dataclasses.replace(settings, types=("Q4_0", "Q8_0")))


def test_predictions_of_the_source_count_too(asked, free, tmp_path):
    free(10**9)
    settings = dataclasses.replace(asked, out=tmp_path / "out", eval_tokens=10**6)
    with pytest.raises(NoRoom, match=r"\(reference-evaluation 128000 MB"):
        run(settings)


def test_room_is_never_overestimated(asked, tmp_path):
    """Of every file that a run made, the estimate was at most its size, and not far below."""
    out = tmp_path / "out"
    kinds = ("BF16", "Q8_0", "Q4_K_M", "Q2_K", "IQ3_XXS", "IQ2_M", "TQ1_0")
    settings = dataclasses.replace(asked, types=kinds, out=out, eval_text=ALICE, keep_source=True)
    run(settings)
    description = describe_checkpoint(asked.source.path)
    for kind in kinds:
        size = (out / f"tiny-{kind}.gguf").stat().st_size
        assert least_bytes(kind, description) <= size
    assert 0.9 * (out / "tiny-BF16.gguf").stat().st_size < least_bytes("BF16", description)
    source_size = (out / "work" / "source.gguf").stat().st_size
    assert 0.9 * source_size < description.source_bytes <= source_size
    given = describe_gguf(out / "work" / "source.gguf")
    assert (given.n_matrix, given.n_vector, given.n_vocab) == (
        description.n_matrix,
        description.n_vector,
        description.n_vocab,
    )


def test_every_type_has_an_estimate():
    description = Description((), None, n_matrix=8000, n_vector=0, n_vocab=1, source_bytes=0)
    found = {kind: least_bytes(kind, description) / 1000 for kind in FTYPES}
    assert (found["F16"], found["Q4_K_M"], found["Q3_K_L"], found["IQ1_M"]) == (16, 4.5, 3.437, 1.75)
    assert all(1 < bits <= 32 for bits in found.values())
