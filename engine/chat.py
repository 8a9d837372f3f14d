"""Render a model's chat template to prompt text.

Templates come from model files, so they are untrusted: an immutable sandbox, loops with a budget and
texts with a limit. Knows nothing of tokens; the caller tokenises with parse_special=True.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2

from engine.request import InvalidRequest
from engine.sandbox import MAX_TEXT, Sandbox

MAX_TEMPLATE_CHARACTERS = 256 * 1024
_USER_TURN = "lq-user-turn-begins-here"


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    **variables: Any,
) -> str:
    """The prompt text for the messages, up to where the assistant's answer begins.

    Raises InvalidRequest: field "messages" when the template refuses them, "chat_template" when the
    template itself is at fault.
    """
    values = {
        "messages": [dict(message) for message in messages],
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
        **variables,
    }
    compiled = _compiled(template)
    try:
        return _joined(compiled, values)
    except jinja2.TemplateError as error:
        raise InvalidRequest(
            f"the chat template refuses these messages: {error}", field="messages"
        ) from error
    except (
        TypeError,
        ValueError,
        KeyError,
        AttributeError,
        RecursionError,
        ArithmeticError,
        LookupError,
    ) as error:
        raise InvalidRequest(
            f"the chat template cannot render these messages: {type(error).__name__}: {error}",
            field="messages",
        ) from error


def open_user_turn(template: str, *, bos_token: str, eos_token: str, system: str | None = None) -> str:
    """The template's text up to where the user's first message would begin."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": _USER_TURN})
    text = render_chat(
        template, messages, bos_token=bos_token, eos_token=eos_token, add_generation_prompt=False
    )
    opening, found, _ = text.partition(_USER_TURN)
    if not found:
        raise InvalidRequest("the chat template does not print the user's message", field="chat_template")
    return opening


def _joined(compiled: jinja2.Template, values: dict[str, Any]) -> str:
    pieces = []
    size = 0
    for piece in compiled.generate(values):
        size += len(piece)
        if size > MAX_TEXT:
            raise InvalidRequest(
                f"the chat template printed more than {MAX_TEXT} characters: send fewer or shorter messages",
                field="messages",
            )
        pieces.append(piece)
    return "".join(pieces)


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InvalidRequest(
            f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS} are read",
            field="chat_template",
        )
    try:
        return _environment().bounded_template(template)
    except (jinja2.TemplateSyntaxError, RecursionError) as error:
        raise InvalidRequest(
            f"the chat template is not valid Jinja: {error}", field="chat_template"
        ) from error


@lru_cache(maxsize=1)
def _environment() -> Sandbox:
    sandbox = Sandbox()
    sandbox.filters["tojson"] = _tojson
    sandbox.globals["raise_exception"] = _raise_exception
    sandbox.globals["strftime_now"] = _strftime_now
    return sandbox


def _tojson(value: Any, *, indent: int | None = None, separators: Any = None, **options: Any) -> str:
    """As transformers does: no HTML escapes, Unicode kept."""
    allowed = {"ensure_ascii": False, "sort_keys": False} | options
    indent = None if indent is None else min(indent, 16)
    return json.dumps(value, indent=indent, separators=separators, **allowed)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:100])
