"""Chat messages -> what the engine continues, by the model's own chat template.

The text of a control token (`<|im_end|>`) inside a message stays text: nobody ends their turn, or opens a
system message, by writing one. Only the template's own control tokens count.
"""

import asyncio
import itertools
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from engine.chat import render_chat
from engine.request import EngineInfo
from prompts.message import Message
from server.engines import Engine
from server.errors import BadRequest

#: Control tokens that the messages of one request may hold as text: the pieces between are tokenised apart.
MAX_WRITTEN = 1000


class NoChatTemplate(BadRequest):
    def __init__(self, model: str) -> None:
        super().__init__(
            f"the model {model!r} has no chat template: use /v1/completions with its own prompt format",
            param="model",
            code="no_chat_template",
        )


class TooManyWritten(BadRequest):
    def __init__(self, example: str) -> None:
        super().__init__(
            f"messages: hold more than {MAX_WRITTEN} of the model's control tokens, such as {example!r}, "
            "written as text: take them out",
            param="messages",
        )


def render(info: EngineInfo, messages: Sequence[Message], *, model: str) -> str:
    """The prompt text, up to where the assistant's answer begins."""
    if info.chat_template is None:
        raise NoChatTemplate(model)
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return render_chat(info.chat_template, turns, bos_token=info.bos_token, eos_token=info.eos_token)


def adds_special(info: EngineInfo, text: str) -> bool:
    """Whether the tokenizer should add BOS: not when the template has printed it."""
    return not (info.bos_token and text.startswith(info.bos_token))


@dataclass(frozen=True, slots=True)
class Part:
    """A text that is tokenised on its own."""

    text: str
    add_special: bool
    parse_special: bool


async def prompt(
    engine: Engine, messages: Sequence[Message], *, model: str, control: re.Pattern[str] | None
) -> Part | tuple[int, ...]:
    """The prompt as one text, or as token ids where messages hold control tokens as text.

    A text is tokenised by the engine as it takes the request: asking for its tokens first would let the
    request wait twice for the step that the engine is at.
    """
    if control is None or not any(control.search(message.content) for message in messages):
        text = render(engine.info, messages, model=model)
        return Part(text, add_special=adds_special(engine.info, text), parse_special=True)
    return await _tokens_beside_written_ones(engine, messages, model=model, control=control)


async def tokens(
    engine: Engine, messages: Sequence[Message], *, model: str, control: re.Pattern[str] | None
) -> tuple[int, ...]:
    """The prompt as token ids."""
    found = await prompt(engine, messages, model=model, control=control)
    return await _tokenize(engine, found) if isinstance(found, Part) else found


async def _tokens_beside_written_ones(
    engine: Engine, messages: Sequence[Message], *, model: str, control: re.Pattern[str]
) -> tuple[int, ...]:
    """Render with a mark in place of each written control token, then tokenise the distinct pieces apart."""
    mark = f"lq{secrets.token_hex(16)}lq"
    numbers: dict[str, int] = {}
    n_written = 0

    def hide(match: re.Match[str]) -> str:
        nonlocal n_written
        n_written += 1
        if n_written > MAX_WRITTEN:
            raise TooManyWritten(match[0])
        return f"{mark}{numbers.setdefault(match[0], len(numbers))}{mark}"

    hidden = [Message(message.role, control.sub(hide, message.content)) for message in messages]
    text = render(engine.info, hidden, model=model)
    written = list(numbers)
    # Odd pieces are the numbers between two marks; their text is read as text.
    pieces = [
        (written[int(piece)], False) if position % 2 else (piece, True)
        for position, piece in enumerate(text.split(mark))
        if piece
    ]
    bos = adds_special(engine.info, text)
    parts = [
        Part(piece, add_special=bos and position == 0, parse_special=is_templates)
        for position, (piece, is_templates) in enumerate(pieces)
    ]
    distinct = list(dict.fromkeys(parts))
    found = dict(
        zip(distinct, await asyncio.gather(*(_tokenize(engine, part) for part in distinct)), strict=True)
    )
    return tuple(itertools.chain.from_iterable(found[part] for part in parts))


async def _tokenize(engine: Engine, part: Part) -> tuple[int, ...]:
    return tuple(
        await engine.tokenize(part.text, add_special=part.add_special, parse_special=part.parse_special)
    )
