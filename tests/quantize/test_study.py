"""The studies of `benchmarks/quantizing` on a finished run: their tables have what they say they have."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.quantizing import study
from quantize.calibration.conversation import read
from quantize.mixes.budget import parse_sizes
from quantize.pipeline import run


@pytest.fixture(scope="module")
def finished(asked, tmp_path_factory) -> Path:
    """A run for a budget, with its source kept."""
    out = tmp_path_factory.mktemp("study")
    budgets = parse_sizes("3.4MB")
    run(dataclasses.replace(asked, types=(), budgets=budgets, eval_tokens=400, keep_source=True, out=out))
    return out


def rows_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_ablation_has_both_types_rounded_in_three_ways(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RECIPES", ("Q4_0", "Q8_0"))
    assert study.main(["ablation", str(finished), "--out", str(tmp_path), "--threads", "1"]) == 0
    rows = rows_of(capsys.readouterr().out)
    types = {row[0] for row in rows}
    assert {kind.partition(" ")[0] for kind in types} == {"llama.cpp's", "ours,"}
    assert [row[1] for row in rows] == ["nearest", "best", "in order"] * 2
    found = {(row[0], row[1]): float(row[3].split()[0]) for row in rows}
    assert len(set(found.values())) == 6
    ours = next(kind for kind in types if kind.startswith("ours"))
    assert found[ours, "best"] < found[ours, "nearest"]
    assert (tmp_path / "ablation.md").read_text("utf-8").startswith("| types |")


def test_calibration_has_three_texts_and_tells_them_apart(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RECIPES", ("Q4_0",))
    text = tmp_path / "words.txt"
    text.write_text(" ".join(f"once upon a time {n} little mice sang to the moon." for n in range(400)))
    asking = ["calibration", str(finished), "--out", str(tmp_path), "--threads", "1", "--text", str(text)]
    assert study.main(asking) == 0
    rows = rows_of(capsys.readouterr().out)
    assert [row[2] for row in rows] == ["its own", "nearest", "best", "in order"] * 3
    assert [row[0] for row in rows] == [
        name for name in ("its own text", "words.txt", "random tokens") for _ in "1234"
    ]
    assert len({tuple(row[4:]) for row in rows}) > 9
    (drawn,) = tmp_path.glob("*/random/calibration.jsonl")
    own = [len(each.tokens) for each in read(finished / "work" / "calibration.jsonl")]
    assert [len(each.tokens) for each in read(drawn)] == own
    assert study.main(asking) == 0
    assert rows_of(capsys.readouterr().out) == rows


def test_calibration_without_a_text_is_refused(finished, capsys):
    with pytest.raises(SystemExit):
        study.main(["calibration", str(finished)])
    assert "--text is None; give the plain text" in capsys.readouterr().err


def test_rank_has_what_was_predicted_beside_what_was_measured(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "RANKED", 12)
    assert study.main(["rank", str(finished), "--out", str(tmp_path), "--threads", "1"]) == 0
    out = capsys.readouterr().out
    rows = rows_of(out)
    assert len(rows) == 12
    assert all(float(row[2]) > 0 < float(row[3].split()[0]) for row in rows)
    assert float(out.rpartition("chats ")[2].split(",")[0]) > 0.5


def test_fewer_tokens_are_measured_beside_what_all_were_measured_to_be(
    finished, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(study, "RANKED", 4)
    told = []
    for tokens in ((), ("--tokens", "30")):
        assert study.main(["rank", str(finished), "--out", str(tmp_path), "--threads", "1", *tokens]) == 0
        told.append([row[3] for row in rows_of(capsys.readouterr().out)])
    assert told[0] != told[1]
    kept = [json.loads(path.read_text("utf-8")) for path in tmp_path.glob("*/measured*.json")]
    counts = {each["chats"]["n_tokens"] for measured in kept for each in measured.values()}
    assert len(counts) == 2
    assert min(counts) < max(counts) // 2
    with pytest.raises(SystemExit):
        study.main(["rank", str(finished), "--tokens", "0"])
    assert "--tokens is 0; give 1 or more" in capsys.readouterr().err


def test_run_without_sensitivities_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["rank", str(tmp_path)])
    assert "holds no sensitivities; RUN is a run with --size" in capsys.readouterr().err
