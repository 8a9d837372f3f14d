"""Chat messages -> what the engine continues, by the model's own chat template.

The text of a control token (`<|im_end|>`) inside a message stays text: nobody ends their turn, or opens a
system message, by writing one. Only the template's own control tokens count.
"""

import re
import secrets
from collections.abc import Sequence

from engine.chat import render_chat
from engine.request import EngineInfo
from prompts.message import Message
from server.engines import Engine
from server.errors import BadRequest


class NoChatTemplate(BadRequest):
    def __init__(self, model: str) -> None:
        super().__init__(
            f"the model {model!r} has no chat template: use /v1/completions with its own prompt format",
            param="model",
            code="no_chat_template",
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


async def tokens(
    engine: Engine, messages: Sequence[Message], *, model: str, control: re.Pattern[str] | None
) -> tuple[int, ...]:
    """The prompt as token ids."""
    if control is None or not any(control.search(message.content) for message in messages):
        text = render(engine.info, messages, model=model)
        return await _tokenize(engine, text, add_special=adds_special(engine.info, text), parse_special=True)
    return await _tokens_beside_written_ones(engine, messages, model=model, control=control)


async def _tokens_beside_written_ones(
    engine: Engine, messages: Sequence[Message], *, model: str, control: re.Pattern[str]
) -> tuple[int, ...]:
    """Render with a mark in place of each written control token, then tokenise the pieces apart."""
    mark = f"lq{secrets.token_hex(16)}lq"
    written: list[str] = []

    def hide(match: re.Match[str]) -> str:
        written.append(match[0])
        return f"{mark}{len(written) - 1}{mark}"

    hidden = [Message(message.role, control.sub(hide, message.content)) for message in messages]
    text = render(engine.info, hidden, model=model)
    found: list[int] = []
    # Odd pieces are the numbers between two marks.
    for position, piece in enumerate(text.split(mark)):
        first = position == 0 and adds_special(engine.info, text)
        is_written = position % 2 == 1
        part = written[int(piece)] if is_written else piece
        if part:
            found += await _tokenize(engine, part, add_special=first, parse_special=not is_written)
    return tuple(found)


async def _tokenize(engine: Engine, text: str, *, add_special: bool, parse_special: bool) -> tuple[int, ...]:
    return tuple(await engine.tokenize(text, add_special=add_special, parse_special=parse_special))
