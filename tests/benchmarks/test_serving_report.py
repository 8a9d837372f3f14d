"""What a run of the serving benchmark leaves behind: a table that says everything, and plots."""

import json
from dataclasses import replace

import msgspec
import pytest

from benchmarks.serving.alone import Solo, Token
from benchmarks.serving.client import Outcome
from benchmarks.serving.contest import Contestant, Result, Settings
from benchmarks.serving.footprint import Footprint, Sample
from benchmarks.serving.load import Round
from benchmarks.serving.plots import charts
from benchmarks.serving.report import ModelReport, document, markdown
from quantize.plots import png, svg

LQ, PEER = Contestant("lq", "lq", ("--threads", "1")), Contestant("llama-server", "llama-server")


def answered(rate: float) -> Round:
    """One request of ten tokens at this rate."""
    stamps = [1.0 + n / rate for n in range(10)]
    outcome = Outcome("clients", 0, 0, stamps=stamps, ended_s=stamps[-1], text="secret", completion_tokens=10)
    return Round([outcome])


def broken() -> Round:
    return Round([Outcome("clients", 0, 0, ended_s=1.0, failure="http", detail="500: cells | full")])


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(threads=2, slots=8, rounds=2, quick=False, timeout_s=9, logs=tmp_path)


@pytest.fixture
def report(tmp_path) -> ModelReport:
    model = tmp_path / "tiny-Q4_0.gguf"
    model.write_bytes(bytes(2_000_000))
    results = (
        Result("clients-4", (LQ, PEER), {"lq": [answered(20.0)] * 2, "llama-server": [answered(10.0)] * 2}),
        Result("rag", (LQ, PEER), {"lq": [answered(20.0)], "llama-server": [broken()]}),
        Result("long-1200", (LQ, PEER), problem="lq serve did not start: no such option"),
    )
    return ModelReport(model, results)


def test_the_table_gives_both_servers_their_ratio_and_the_verdict(report, settings):
    text = markdown([report], settings)
    (row,) = [line for line in text.splitlines() if line.startswith("| clients-4 ")]
    assert "throughput (tokens/s) | 6.9 | 5.3 | 1.31 (1.31-1.31) | ≥ 1.05×, met" in row
    assert "tiny-Q4_0.gguf (2 MB)" in text
    assert "lq with --threads 1" in text


def test_failures_and_what_did_not_run_are_told(report, settings):
    text = markdown([report], settings)
    assert "rag, llama-server: 1 of 1 failed: 1 http: 500: cells | full" in text
    assert "long-1200 was not run" in text
    assert "no such option" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| rag ")]
    assert "| none |" in row
    assert "met" not in row


def test_json_keeps_every_request_and_nothing_that_was_written(report, settings):
    text = json.dumps(msgspec.to_builtins(document([report], settings)))
    assert "secret" not in text
    chats = json.loads(text)["models"][0]["scenarios"][0]
    assert len(chats["rounds"]["lq"]) == 2
    assert chats["rounds"]["lq"][0]["requests"][0]["stamps"][0] == 1.0


def test_charts_are_drawn_also_where_a_server_only_failed(report):
    drawn = charts(report)
    assert set(drawn) == {"throughput", "first-token", "longest-gap"}
    for figure in drawn.values():
        assert png(figure).startswith(b"\x89PNG")
        assert b"<svg" in svg(figure)


def test_nothing_is_drawn_of_a_run_without_results(report):
    assert charts(ModelReport(report.model, report.results[2:])) == {}


def test_what_is_played_beside_a_round_is_in_the_json_and_in_plots_of_its_own(report, settings):
    seen = Footprint((Sample(0.0, 5, 80_000_000, 1_000), Sample(2.0, 10, 90_000_000, 1_000)), 70_000_000)
    token = Token(b"other", -0.5, ((b"other", -0.5), (b"secret", -0.75)))
    alone = replace(answered(20.0), alone=(Solo(0, 0, (token,)),))
    flood = replace(answered(20.0), without=answered(10.0))
    results = [
        Result(name, (LQ, PEER), {"lq": [played], "llama-server": [broken()]})
        for name, played in (
            ("oversubscribed", alone),
            ("flood", flood),
            ("memory", replace(answered(20.0), footprint=seen)),
        )
    ]
    report = ModelReport(report.model, tuple(results))
    record = json.loads(json.dumps(msgspec.to_builtins(document([report], settings))))
    rounds = [each["rounds"]["lq"][0] for each in record["models"][0]["scenarios"]]
    assert rounds[0]["partings"] == [{"client": 0, "turn": 0, "at_byte": 0, "gap": 0.25}]
    assert rounds[1]["without"]["group"] == "flood"
    assert len(rounds[1]["without"]["requests"]) == 1
    assert rounds[2]["footprint"]["samples"][1]["held_bytes"] == 90_000_000
    assert "secret" not in json.dumps(record)
    assert "| 20 | none |  | ≤ 400 MB, met |" in markdown([report], settings)
    assert "memory" in charts(report)
