"""Greedy answers to held-out questions: the same questions for every file, and what differs is counted."""

import dataclasses

import pytest

from quantize.calibration.conversation import Conversation, Span, read
from quantize.card import _one_line
from quantize.measure import Backend
from quantize.pipeline import run
from quantize.samples import N_QUESTIONS, N_TOKENS, Answer, _chosen, _prompt, answers


def conversation(number: int, question: str) -> Conversation:
    spans = (Span("template", 2), Span("user", 3), Span("template", 1), Span("assistant", 4))
    return Conversation(number, number, 1.0, tuple(range(10)), spans, user=question, assistant="so")


def test_short_questions_come_first_and_long_ones_fill_up():
    asked = [conversation(0, "x" * 500), conversation(1, "who?"), conversation(2, "why?")]
    assert [each.number for each in _chosen(asked)] == [1, 2, 0]
    assert len(_chosen([conversation(i, "how?") for i in range(9)])) == N_QUESTIONS


def test_prompt_ends_where_the_answer_begins():
    assert _prompt(conversation(0, "who?")) == tuple(range(6))


def test_plain_text_is_asked_to_go_on_after_its_opening():
    text = Conversation(0, 0, 1.0, tuple(range(60)), (Span("template", 1), Span("assistant", 59)))
    assert _prompt(text) == tuple(range(17))


@pytest.mark.parametrize(
    ("other", "same"), [((1, 2, 3), 3), ((1, 2, 4), 2), ((9, 2, 3), 0), ((1, 2), 2), ((), 0)]
)
def test_tokens_before_the_first_difference_are_counted(other, same):
    assert Answer("q", "t", (1, 2, 3)).same_as(Answer("q", "t", other)) == same


def test_text_of_an_answer_breaks_no_table():
    assert _one_line("a | b\n\n# c <i>*d*</i>\n") == r"a \| b ⏎ # c &lt;i&gt;\*d\*&lt;/i&gt;"
    assert _one_line(" \n") == "(nothing)"


def test_files_answer_the_same_questions_greedily(asked, tmp_path):
    report = run(dataclasses.replace(asked, types=("Q8_0",), eval_tokens=800, out=tmp_path, keep_source=True))
    (file,) = report.files
    assert len(file.answers) == len(report.source.answers) == N_QUESTIONS
    assert [a.question for a in file.answers] == [a.question for a in report.source.answers]
    assert all(0 < len(answer.tokens) <= N_TOKENS for answer in file.answers)
    again = answers(
        tmp_path / "work" / "source.gguf", read(tmp_path / "work" / "evaluation.jsonl"), backend=Backend(1)
    )
    assert tuple(again) == report.source.answers
    card = (tmp_path / "report.md").read_text("utf-8")
    assert "## Samples" in card
    assert _one_line(report.source.answers[0].text) in card
