"""The same greedy requests asked one by one, and where their texts part from those written under load.

Asked without a stream, with the log-probabilities of the likeliest tokens, and behind a cache salt of its
own each: nothing that was computed under load serves it. Only lq is asked, for `cache_salt` is its own field.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from benchmarks.serving.client import Outcome, exchanged, post

N_TOP = 5  # beyond the fifth likeliest no two are about as likely


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer, and the likeliest at its place, each with its log-probability in nats."""

    text: bytes
    logprob: float
    likeliest: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Solo:
    """A request's answer when nobody else asks; `failure` says why there is none."""

    client: int
    turn: int
    tokens: tuple[Token, ...] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Parting:
    """Where a text leaves that written alone. `gap`: by how much, in logits, the token alone was likelier
    there than the one under load; None when that was not among the likeliest, or when one text just ends."""

    client: int
    turn: int
    at_byte: int
    gap: float | None


class _Top(msgspec.Struct):
    bytes: list[int]
    logprob: float


class _Token(_Top):
    top_logprobs: list[_Top]


class _Logprobs(msgspec.Struct):
    content: list[_Token]


class _Choice(msgspec.Struct):
    logprobs: _Logprobs


class _Answer(msgspec.Struct):
    choices: list[_Choice]


async def ask_alone(
    port: int, body: dict[str, Any], *, client: int, turn: int, key: str | None, timeout_s: float
) -> Solo:
    """Ask what `body` streamed; never raises for what a server does."""
    salt = f"alone-{client}-{turn}"
    asked = {name: value for name, value in body.items() if name not in ("stream", "stream_options")}
    asked |= {"logprobs": True, "top_logprobs": N_TOP, "cache_salt": salt}
    request = post(port, "/v1/chat/completions", asked, key=key)
    exchange = await exchanged(port, request, timeout_s=timeout_s)
    if exchange is None or exchange.status != 200 or not exchange.finished:
        said = bytes(exchange.body[:300]).decode("utf-8", "replace") if exchange else "no answer in time"
        return Solo(client, turn, failure=said or "the connection ended before a response")
    try:
        answer = msgspec.json.decode(exchange.body, type=_Answer)
    except msgspec.DecodeError as error:
        return Solo(client, turn, failure=str(error))
    tokens = tuple(_token(each) for choice in answer.choices for each in choice.logprobs.content)
    return Solo(client, turn, tokens)


def _token(given: _Token) -> Token:
    likeliest = tuple((bytes(each.bytes), each.logprob) for each in given.top_logprobs)
    return Token(bytes(given.bytes), given.logprob, likeliest)


def partings(outcomes: Sequence[Outcome], alone: Sequence[Solo]) -> list[Parting]:
    """Answered requests whose text is another than alone; one that failed alone counts among them."""
    texts = {(each.client, each.turn): each.text for each in outcomes if each.complete}
    found = []
    for solo in alone:
        text = texts.get((solo.client, solo.turn))
        if text is not None and (parting := parted(text, solo)) is not None:
            found.append(parting)
    return found


def parted(text: str, solo: Solo) -> Parting | None:
    """Where a text leaves the tokens written alone; None when it is the same text."""
    if not solo.failure and b"".join(each.text for each in solo.tokens).decode("utf-8", "replace") == text:
        return None
    rest, at = text.encode(), 0
    for token in solo.tokens:
        if not rest[at:].startswith(token.text):
            return Parting(solo.client, solo.turn, at, _gap(token, rest[at:]))
        at += len(token.text)
    return Parting(solo.client, solo.turn, at, None)


def unlike(first: Sequence[Solo], again: Sequence[Solo]) -> int:
    """Requests of `again` whose text is another than alone the first time: what no load has done."""
    texts = {(each.client, each.turn): _text(each) for each in first}
    return sum(_text(each) != texts.get((each.client, each.turn)) for each in again)


def _text(solo: Solo) -> bytes | None:
    return None if solo.failure else b"".join(each.text for each in solo.tokens)


def _gap(token: Token, rest: bytes) -> float | None:
    """From the chosen token to the likeliest with which the other text could go on."""
    others = [value for text, value in token.likeliest if text and rest.startswith(text)]
    return token.logprob - max(others) if others else None
