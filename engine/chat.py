"""Render a model's chat template to prompt text.

Templates come from model files, so they are untrusted and run in the sandbox. Knows nothing of tokens:
the caller tokenises the text with parse_special=True.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2

from engine.request import InvalidRequest
from engine.sandbox import Sandbox, bounded_text

MAX_TEMPLATE_CHARACTERS = 256 * 1024


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, object] | None = None,
) -> str:
    """The prompt text for the messages, up to where the assistant's answer begins.

    `variables` are what a template knows beyond the usual, such as Qwen3's `enable_thinking`; they never
    replace what is named here.
    Raises InvalidRequest: field "messages" when the template refuses or cannot print them,
    "chat_template" when it is not Jinja at all.
    """
    values = {
        **(variables or {}),
        "messages": [dict(message) for message in messages],
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        "tools": tools,
    }
    compiled = _compiled(template)
    try:
        return _sandbox().render(compiled, values)
    except jinja2.TemplateError as error:
        raise InvalidRequest(
            f"the chat template refuses these messages: {error}", field="messages"
        ) from error
    except Exception as error:  # whatever untrusted code ran into is its own fault, not ours
        raise InvalidRequest(
            f"the chat template fails on these messages: {type(error).__name__}: {error}", field="messages"
        ) from error


@lru_cache(maxsize=32)
def _compiled(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InvalidRequest(
            f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE_CHARACTERS} are read",
            field="chat_template",
        )
    try:
        return _sandbox().bounded_template(template)
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise InvalidRequest(
            f"the chat template is not valid Jinja: {error}", field="chat_template"
        ) from error


@lru_cache(maxsize=1)
def _sandbox() -> Sandbox:
    return Sandbox(
        filters={"tojson": _tojson},
        functions={"raise_exception": _raise_exception, "strftime_now": _strftime_now},
    )


def _tojson(
    value: Any,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    ensure_ascii: bool = False,
    sort_keys: bool = False,
) -> str:
    """As transformers does: no HTML escapes, Unicode kept."""
    encoder = json.JSONEncoder(
        indent=None if indent is None else min(indent, 16),
        separators=None if separators is None else (separators[0][:16], separators[1][:16]),
        ensure_ascii=ensure_ascii,
        sort_keys=sort_keys,
    )
    return bounded_text(encoder.iterencode(value)) if indent else encoder.encode(value)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern[:100])
