"""The card, the table, the plots: what people see of a report."""

import dataclasses
import json
from xml.etree import ElementTree

import pytest
import yaml
from matplotlib.text import Text

from quantize.card import card
from quantize.divergence import Divergence, Estimate
from quantize.figures import COLUMNS, number, row, with_error
from quantize.gguf_files.typemap import TypeMap, TypeShare
from quantize.mixes import chart
from quantize.plots import divergence_figure, png, speed_figure, svg, tradeoff_figure
from quantize.report import (
    FileReport,
    MixReport,
    Report,
    SourceReport,
    TextReport,
    Tried,
    divergence_of,
    to_json,
    types_of,
)
from quantize.speed import Speed

KINDS = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")


def divergence(mean: float) -> Divergence:
    return Divergence(
        n_tokens=8000, n_sequences=60, kl=Estimate(mean, abs(mean) / 30), kl_median=mean / 2, kl_90=2 * mean,
        kl_99=5 * mean, kl_999=9 * mean, kl_max=20 * mean, same_top=Estimate(0.95, 0.002), delta_p_rms=0.03,
        perplexity_reference=4.1, perplexity=4.2, perplexity_ratio=Estimate(1.024, 0.003),
    )  # fmt: skip


def file(kind: str, i: int) -> FileReport:
    megabytes = 145 - 7 * i
    shares = (TypeShare(kind, 200, 100_000_000, megabytes * 900_000), TypeShare("F32", 61, 35_000, 140_000))
    types = TypeMap(megabytes * 1_000_000, 134_515_008, 8.5 - 0.4 * i, shares)
    text = divergence(0.006 * 1.9**i)
    return FileReport(
        kind, f"m-{kind}.gguf", "ab" * 32, types, Speed(700, 150 + i), divergence(0.004 * 1.9**i), text, None
    )


@pytest.fixture
def report() -> Report:
    files = tuple(file(kind, i) for i, kind in enumerate(KINDS))
    types = TypeMap(270_000_000, 134_515_008, 16.0, (TypeShare("BF16", 211, 134_000_000, 269_000_000),))
    source = SourceReport(
        "m", "hf:org/m", "BF16", "cd" * 32, "my-lora", types, Speed(900, 110), "llama", "apache-2.0", "org/m"
    )
    text = TextReport("written by the model itself", 60, 16_000, 8000, {"endless answer": 4}, "ef" * 32)
    return Report(
        source=source, files=files, calibration=text, evaluation=text, text=text, importance_sha256="01" * 32,
        command="lq quantize hf:org/m --out m", seed=0, machine="a processor", n_threads=2,
        versions={"gguf": "1"}, seconds={"source": 60.0, "reference": 120.0}, warnings=("rows fell back",),
    )  # fmt: skip


def test_card_has_front_matter_a_hub_reads(report):
    _, front, body = card(report).split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["license"] == "apache-2.0"
    assert values["base_model"] == "org/m"
    assert values["base_model_relation"] == "quantized"
    assert "gguf" in values["tags"]
    assert body.lstrip().startswith("# m: GGUF")


def test_card_tells_all_there_is_to_know(report):
    text = card(report)
    for file in report.files:
        assert file.file in text
        assert file.sha256 in text
    for said in (
        "adapter my-lora merged in", "0.00400 ± 0.00013", "95.00 ± 0.20 %", "1.0240 ± 0.0030",
        "rows fell back", "Dropped: 4 endless answer", "lq quantize hf:org/m --out m", "3.0 minutes",
        "cd" * 32, "01" * 32,
        "a processor", "Q8_0 74.3 % (200)",
    ):  # fmt: skip
        assert said in text, said


def test_card_tables_have_as_many_cells_as_columns(report):
    lines = [line for line in card(report).splitlines() if line.startswith("|")]
    table: list[int] = []
    for line in lines:
        cells = line.count("|")
        if set(line) <= set("|- "):
            assert cells == table[-1]
        table.append(cells)
    assert len(lines) > 30


def test_without_measurements_the_card_and_the_table_say_so_by_dashes(report):
    bare = tuple(dataclasses.replace(file, chats=None, text=None) for file in report.files)
    empty = dataclasses.replace(
        report, files=bare, evaluation=None, text=None, calibration=None, importance_sha256=None
    )
    assert "Calibration: none" in card(empty)
    assert divergence_figure(empty) is None
    assert tradeoff_figure(empty) is None
    assert row(bare[0], None)[3:8] == ("-",) * 5
    assert len(row(bare[0], None)) == len(COLUMNS)


def test_numbers_have_as_many_digits_as_their_error_allows():
    assert with_error(Estimate(0.0312345, 0.00081)) == "0.03123 ± 0.00081"
    assert with_error(Estimate(95.123, 0.42)) == "95.12 ± 0.42"
    assert with_error(Estimate(1.5, None)) == "1.50"
    assert with_error(Estimate(1.0, 0.0)) == "1.00"
    assert number(0.000123456) == "0.000123"
    assert number(12.3456) == "12.3"
    assert number(0) == "0"


def test_plots_are_images_and_name_every_file(report):
    for figure in (divergence_figure(report), tradeoff_figure(report), speed_figure(report)):
        assert figure is not None
        assert png(figure).startswith(b"\x89PNG")
        picture = ElementTree.fromstring(svg(figure))
        assert picture.tag.endswith("svg")
        labels = [text.get_text() for text in figure.axes[0].texts]
        assert set(KINDS) <= set(labels)


def test_line_joins_the_files_that_none_beats_in_both(report):
    worse = dataclasses.replace(report.files[2], chats=divergence(1.0))
    report = dataclasses.replace(report, files=(*report.files[:2], worse, *report.files[3:]))
    for figure, expected in (
        (divergence_figure(report), [89, 96, 103, 110, 117, 124, 138, 145]),
        (tradeoff_figure(report), [157, 156, 155, 154, 153, 151, 150]),
    ):
        assert figure is not None
        fronts = [line for line in figure.axes[0].lines if len(line.get_xdata()) > 1 and line.get_alpha()]
        drawn = [round(float(x)) for x in fronts[0].get_xdata()]
        assert [x for x in expected if x in drawn] == drawn
        assert round(worse.types.size_bytes / 1e6) not in drawn
        assert len(drawn) == 7


MIX = {
    "token_embd.weight": "Q6_K", "blk.0.attn_q.weight": "Q4_0", "blk.1.attn_q.weight": "Q4_0",
    "blk.2.attn_q.weight": "Q5_0", "blk.0.ffn_down.weight": "Q8_0", "blk.2.ffn_down.weight": "IQ4_NL",
}  # fmt: skip


def mixed(report: Report) -> Report:
    """The same with a file within a budget."""
    tried = (Tried(0.05, 0.06, 91_000_000), Tried(0.051, 0.055, 91_100_000))
    file = dataclasses.replace(report.files[3], type="92MB", mix=MixReport("size", MIX, tried, 1, 0.5))
    return dataclasses.replace(report, files=(*report.files, file))


def test_card_says_how_a_mix_was_chosen_and_what_each_tensor_is(report):
    text = card(mixed(report))
    assert "### 92MB" in text
    assert "objective: size); rounded with 0.50 of the loss" in text
    assert "| 91.00 | 0.0500 | 0.0600 |  |\n| 91.10 | 0.0510 | 0.0550 | chosen |" in text
    assert "| token_embd | Q6_K |\n| attn_q | 0-1 Q4_0, 2 Q5_0 |\n| ffn_down | 0 Q8_0, 2 IQ4_NL |" in text
    assert "types-92MB.png" in text
    assert "### " not in card(report)


def test_mixes_have_a_mark_of_their_own(report):
    figure = divergence_figure(mixed(report))
    assert figure is not None
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert labels == [f"{what}, {kind}" for what in ("self-written chats", "public text")
                      for kind in ("recipes", "within a budget")]  # fmt: skip


def test_map_of_types_names_parts_and_types():
    drawn = chart.figure("m, 92MB", MIX)
    assert png(drawn).startswith(b"\x89PNG")
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == [
        "token_embd",
        "attn_q",
        "ffn_down",
    ]
    legend = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert legend == ["Q8_0  8.50", "Q6_K  6.56", "Q5_0  5.50", "Q4_0  4.50", "IQ4_NL  4.50"]
    cells = drawn.axes[0].collections[0].get_array()
    assert cells[0].tolist() == [3, 3, 3]  # the embedding, everywhere
    assert cells[2].tolist() == [4, 5, 0]  # no such tensor in layer 1


@pytest.mark.parametrize("mean", [0.01, 0.0, -1e-8])
def test_one_file_or_one_without_loss_can_be_drawn(report, mean):
    one = dataclasses.replace(report.files[0], chats=divergence(mean), text=None)
    figure = divergence_figure(dataclasses.replace(report, files=(one,)))
    assert figure is not None
    assert png(figure).startswith(b"\x89PNG")


def test_labels_of_crowded_points_do_not_lie_upon_each_other(report):
    """Half the files within one megabyte and much the same divergence, as fallbacks make them."""
    crowd = [
        dataclasses.replace(
            file,
            types=dataclasses.replace(file.types, size_bytes=91_600_000 + 100_000 * i),
            chats=divergence(0.2 + 0.01 * i),
        )
        for i, file in enumerate(report.files[4:])
    ]
    report = dataclasses.replace(report, files=(*report.files[:4], *crowd))
    for figure in (divergence_figure(report), tradeoff_figure(report), speed_figure(report)):
        assert figure is not None
        png(figure)
        boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts if text.get_text() in KINDS]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_json_reads_back_as_the_same_records(report):
    again = json.loads(to_json(report))
    first = again["files"][0]
    assert divergence_of(first["chats"]) == report.files[0].chats
    assert types_of(first["types"]) == report.files[0].types
    assert divergence_of(None) is None


def test_what_the_user_should_know_is_on_the_terminal_and_in_the_card(report, capsys, tmp_path):
    from lq.commands.quantize import _show

    _show(report, tmp_path)
    assert "note: rows fell back\n" in capsys.readouterr().out
    assert "## Know this\n\n- rows fell back" in card(report)
