"""Outcomes of requests that nobody sent, for the arithmetic of the serving benchmark."""

from typing import Any

from benchmarks.serving.client import Outcome


def answered(*stamps: float, sent_s: float = 0.0, tokens: int | None = None, **fields: Any) -> Outcome:
    """A request that was answered to the end, one token of four characters a chunk unless told."""
    given = {"group": "clients", "client": 0, "turn": 0, "sizes": [4] * len(stamps)} | fields
    outcome = Outcome(**given)
    outcome.sent_s, outcome.stamps, outcome.ended_s = sent_s, list(stamps), stamps[-1]
    outcome.completion_tokens = len(stamps) if tokens is None else tokens
    return outcome


def left(*stamps: float, ended_s: float, **fields: Any) -> Outcome:
    """A request whose client hung up: nobody told how many tokens it had."""
    outcome = answered(*stamps, **fields)
    outcome.left, outcome.ended_s, outcome.completion_tokens = True, ended_s, None
    return outcome
