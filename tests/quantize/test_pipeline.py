"""The pipeline on a tiny random model: stopped anywhere it goes on, changed it redoes what it must."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import pytest
from filelock import FileLock

from models.errors import ModelsError
from models.store import Store
from quantize import pipeline
from quantize.calibration.conversation import read
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.calibration.texts import UnusableText
from quantize.disk import DiskFull
from quantize.errors import QuantizeError
from quantize.gguf_files.types import NeedsImportance
from quantize.pipeline import FolderBusy, run
from quantize.source import UnusableSource, find, named

TYPES = ("Q8_0", "Q4_K_M")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("finished")
    run(dataclasses.replace(asked, out=out, command="lq quantize tiny"))
    return out


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the finished folder; times kept, as they are part of the manifests."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def hashes(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.gguf")}


def test_a_run_leaves_files_matrix_report_and_plots_and_no_large_leftovers(finished):
    assert {path.name for path in finished.iterdir()} == {
        "tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "imatrix.gguf", "report.md", "report.json", "work",
        "divergence.png", "divergence.svg", "speed.png", "speed.svg", "tradeoff.png", "tradeoff.svg",
        "tensors.png", "tensors.svg",
    }  # fmt: skip
    assert not [
        path for path in (finished / "work").iterdir() if path.suffix in (".gguf", ".f32", ".partial")
    ]
    matrix = ImportanceMatrix.read(finished / "imatrix.gguf")
    assert "token_embd.weight" in matrix.entries
    assert "output.weight" in matrix.entries
    reader = gguf.GGUFReader(finished / "tiny-Q4_K_M.gguf")
    assert reader.get_field("quantize.imatrix.entries_count").contents() == len(matrix.entries)


def test_the_report_holds_every_figure(finished):
    report = json.loads((finished / "report.json").read_text("utf-8"))
    assert [file["type"] for file in report["files"]] == list(TYPES)
    q8, q4 = report["files"]
    assert 0 < q8["chats"]["kl"]["mean"] < q4["chats"]["kl"]["mean"]
    assert q8["chats"]["n_tokens"] >= 100
    assert 0.5 < q8["chats"]["same_top"]["mean"] <= 1
    assert q8["sha256"] == hashes(finished)["tiny-Q8_0.gguf"]
    assert q4["types"]["bits_per_weight"] < q8["types"]["bits_per_weight"]
    assert "fell back" in q4["warning"]
    assert min(q8["speed"].values()) > 0
    assert report["calibration"]["n_tokens"] >= 600
    assert "no chat template" in report["calibration"]["origin"]
    assert report["seconds"]["quantize-Q8_0"] > 0


def test_the_card_has_front_matter_table_hashes_and_command(finished):
    card = (finished / "report.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: gguf")
    assert "[tiny-Q8_0.gguf](tiny-Q8_0.gguf)" in card
    assert hashes(finished)["tiny-Q4_K_M.gguf"] in card
    assert "```sh\nlq quantize tiny\n```" in card
    assert "has no chat template" in card
    assert "±" in card


def test_calibration_and_evaluation_share_no_seed_and_no_text(finished):
    def lines(name):
        text = (finished / "work" / f"{name}.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.splitlines()[1:] if "tokens" in line]

    calibration, evaluation = lines("calibration"), lines("evaluation")
    assert not {c["seed"] for c in calibration} & {e["seed"] for e in evaluation}
    assert not {tuple(c["tokens"]) for c in calibration} & {tuple(e["tokens"]) for e in evaluation}


def test_the_same_run_again_does_nothing(copy, asked, made):
    before = hashes(copy)
    run(dataclasses.replace(asked, out=copy))
    assert made == []
    assert hashes(copy) == before


def test_another_type_costs_that_type_only(copy, asked, made):
    run(dataclasses.replace(asked, out=copy, types=(*TYPES, "IQ4_NL"), keep_source=True))
    wanted = {f"{step}-IQ4_NL" for step in ("quantize", "divergence-evaluation", "speed", "samples")}
    assert set(made) == wanted | {"source", "reference-evaluation"}
    assert (copy / "work" / "source.gguf").exists()


def test_another_amount_of_calibration_keeps_source_and_generator_free_steps(copy, asked, made):
    run(dataclasses.replace(asked, out=copy, calibration_tokens=700))
    assert "description" not in made
    assert {"calibration", "importance", "quantize-Q8_0", "quantize-Q4_K_M"} < set(made)
    assert Counter(made).most_common(1)[0][1] == 1


def test_a_file_that_was_tampered_with_is_made_again(copy, asked, made):
    before = hashes(copy)
    (copy / "tiny-Q8_0.gguf").write_bytes(b"short")
    run(dataclasses.replace(asked, out=copy))
    assert "quantize-Q8_0" in made
    assert "quantize-Q4_K_M" not in made
    assert hashes(copy) == before


def test_interrupted_at_every_step_and_midway_it_resumes_there_and_ends_the_same(
    finished, asked, tmp_path, made
):
    """One folder, stopped at the first and at a middle report of every step in turn."""
    out, stopped = tmp_path / "out", Counter()

    class Stop(KeyboardInterrupt):
        pass

    def progress(what, done, total):
        heading = what.partition(":")[0]
        if stopped[heading] == 0 or (stopped[heading] == 1 and total and done > total // 2):
            stopped[heading] += 1
            raise Stop

    settings = dataclasses.replace(asked, out=out)
    for _ in range(60):
        with contextlib.suppress(Stop):
            run(settings, progress=progress)
            break
    else:
        pytest.fail("it never ended")
    assert {"quantizing Q8_0", "collecting importance", "measuring Q8_0", "writing the report"} <= set(
        stopped
    )
    assert stopped["quantizing Q8_0"] == stopped["predicting with the source"] == 2
    assert max(Counter(made).values()) == 1
    assert not list(out.rglob("*.partial"))
    assert hashes(out) == hashes(finished)
    assert (out / "report.md").exists()


def test_killed_for_real_it_resumes(asked, tmp_path):
    out = tmp_path / "out"
    code = f"""
from pathlib import Path
from quantize.measure import Backend
from quantize.pipeline import run
from quantize.settings import Settings
from quantize.source import Source
if __name__ == "__main__":
    source = Source("tiny", "checkpoint", Path({str(asked.source.path)!r}), "tiny")
    run(Settings(source, Path({str(out)!r}), {TYPES!r}, calibration_tokens=600, eval_tokens=100, n_parallel=4,
        backend=Backend(1)), progress=lambda what, *_: print(what, flush=True))
"""
    script = tmp_path / "script.py"
    script.write_text(code, "utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("quantizing Q8_0"):
                process.send_signal(signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL
    conversations = (out / "work" / "calibration.jsonl").stat().st_mtime_ns
    assert not (out / "tiny-Q8_0.gguf").exists()
    run(dataclasses.replace(asked, out=out))
    assert (out / "work" / "calibration.jsonl").stat().st_mtime_ns == conversations
    assert (out / "report.md").exists()
    assert not list(out.rglob("*.partial"))


def test_two_runs_in_one_folder_are_refused(copy, asked):
    with FileLock(copy / "work" / ".lock"), pytest.raises(FolderBusy, match="another `lq quantize` works in"):
        run(dataclasses.replace(asked, out=copy))


def test_full_disk_says_what_to_do_and_loses_nothing(copy, asked, monkeypatch, made):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", str(copy / "report.md"))

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_text", full)
        with pytest.raises(DiskFull, match=r"could not write .*report.md: No space left.*--out"):
            run(dataclasses.replace(asked, out=copy))
    run(dataclasses.replace(asked, out=copy))
    assert made == []


def test_without_calibration_there_is_no_matrix_and_needy_types_are_refused(asked, tmp_path):
    settings = dataclasses.replace(asked, calibration="none", out=tmp_path / "out")
    with pytest.raises(NeedsImportance, match="IQ2_XS"):
        run(dataclasses.replace(settings, types=("Q8_0", "IQ2_XS")))
    assert not settings.out.exists()
    report = run(dataclasses.replace(settings, types=("Q4_0",)))
    assert report.calibration is None
    assert not (settings.out / "imatrix.gguf").exists()
    assert "Calibration: none" in (settings.out / "report.md").read_text("utf-8")


def test_a_text_file_calibrates_and_measures(asked, tmp_path):
    text = tmp_path / "alice.txt"
    text.write_text((Path(__file__).parent / "golden" / "alice.txt").read_text("utf-8"), "utf-8")
    settings = dataclasses.replace(
        asked, calibration=text, eval_text=text, out=tmp_path / "out", types=("Q4_0",)
    )
    report = run(settings)
    assert report.calibration is not None
    assert "alice.txt" in report.calibration.origin
    assert report.files[0].text is not None
    assert report.files[0].text.n_tokens >= 100
    assert "alice.txt" in (settings.out / "report.md").read_text("utf-8")


def test_a_text_file_beside_its_own_chats_calibrates_by_half_of_each(asked, tmp_path):
    text = Path(__file__).parent / "golden" / "alice.txt"
    settings = dataclasses.replace(
        asked, calibration_text=text, calibration_tokens=1400, out=tmp_path / "out", types=("Q4_0",)
    )
    report = run(settings)
    assert report.calibration is not None
    assert "written by the model itself" in report.calibration.origin
    assert "alice.txt" in report.calibration.origin
    found = read(tmp_path / "out" / "work" / "calibration.jsonl")
    assert [each.number for each in found] == [*range(len(found))]
    prose = [bool(each.count("text")) for each in found]
    cut = sum(len(each.tokens) for each in found if each.count("text"))
    assert 0.2 < cut / report.calibration.n_tokens < 0.8
    middle = len(prose) // 2  # both kinds on either side of it
    assert len(set(prose[:middle])) == len(set(prose[middle:])) == 2
    assert report.calibration.n_tokens == sum(len(each.tokens) for each in found)
    with pytest.raises(QuantizeError, match=r"alice.txt goes beside what the model writes itself"):
        run(dataclasses.replace(settings, calibration="none", out=tmp_path / "none"))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "the file is empty"),
        (b" \n\t\n", "the file is empty"),
        (b"\x7fELF\xff\xfe\x00\x01" * 500, "looks like a binary file"),
        (b"zero\0bytes " * 500, "NUL bytes"),
        (b"far too short", "it has only"),
    ],
)
def test_a_text_that_cannot_calibrate_is_refused_by_reason(content, complaint, copy, asked, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    with pytest.raises(UnusableText, match=complaint):
        run(dataclasses.replace(asked, calibration=text, out=copy))
    with pytest.raises(UnusableText, match=complaint):
        run(dataclasses.replace(asked, calibration_text=text, out=copy))


def test_a_missing_text_is_named(asked, tmp_path):
    with pytest.raises(UnusableText, match=r"nowhere.txt: it cannot be read"):
        run(dataclasses.replace(asked, calibration=tmp_path / "nowhere.txt", out=tmp_path / "out"))


def test_a_quantized_source_needs_to_be_allowed_and_is_told_in_the_report(finished, asked, tmp_path):
    source = find(str(finished / "tiny-Q8_0.gguf"), store=Store(tmp_path))
    assert source.name == "tiny"
    settings = dataclasses.replace(asked, source=source, out=tmp_path / "out", types=("Q4_0",))
    with pytest.raises(UnusableSource, match=r"quantized already.*--allow-requantize"):
        run(settings)
    report = run(dataclasses.replace(settings, allow_requantize=True))
    assert "The source is quantized itself (Q8_0)" in report.warnings[0]
    assert (finished / "tiny-Q8_0.gguf").exists()


def test_an_adapter_with_a_gguf_is_refused(finished, asked, tmp_path):
    source = find(str(finished / "tiny-Q8_0.gguf"), store=Store(tmp_path))
    settings = dataclasses.replace(
        asked, source=source, adapter=tmp_path, out=tmp_path, allow_requantize=True
    )
    with pytest.raises(UnusableSource, match=r"--lora is merged into a checkpoint"):
        run(settings)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"calibration_tokens": 5}, "--calibration-tokens is 5"),
        ({"eval_tokens": 1}, "--eval-tokens is 1"),
        ({"seed": -1}, "--seed is -1"),
        ({"types": ()}, "--types"),
    ],
)
def test_a_value_out_of_range_is_named(change, complaint, asked, tmp_path):
    with pytest.raises(QuantizeError, match=complaint):
        run(dataclasses.replace(asked, out=tmp_path, **change))


def test_a_folder_without_a_model_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelsError):
        find(str(tmp_path / "empty"), store=Store(tmp_path / "home"))
    with pytest.raises(ModelsError, match="nothing-like-this"):
        find("nothing-like-this", store=Store(tmp_path / "home"))


def test_a_name_that_is_a_path_is_refused(asked):
    with pytest.raises(UnusableSource, match="--name"):
        named(asked.source, "../up")
