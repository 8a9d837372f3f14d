"""Bytes of a body -> a wire type, strictly, with errors that name the field, its value and the remedy.

Litestar's own conversion turns "5" into 5, so it is not used.
"""

import difflib
import re
from typing import Any, TypeVar

import msgspec

from server.errors import BadJSON, BadRequest
from server.schema.refused import REASONS

T = TypeVar("T")

_PLACE = re.compile(r"^(?P<problem>.*?)(?: - at (?:`(?P<what>key|value)` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_STEP = re.compile(r"\.(?P<name>[^.\[]+)|\[(?P<index>\d+|\.\.\.)\]")
_FIELD = re.compile(r"(?:unknown|required) field `(?P<name>.*)`")
_VALUE = re.compile(r"Invalid (?:enum )?value (?P<value>.*)")
_MISSING = object()
#: Names are compared and quoted up to here.
NAME_CHARACTERS = 100


def decode(body: bytes, wire_type: type[T]) -> T:
    """The body as `wire_type`; raises BadJSON or BadRequest."""
    try:
        return msgspec.json.decode(body, type=wire_type)
    except msgspec.ValidationError as error:
        raise _explain(str(error), body, wire_type) from None
    except RecursionError:
        raise BadJSON("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadJSON(_reason(error)) from None


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is not UTF-8"
    return str(error).removeprefix("JSON is malformed: ")


def _explain(text: str, body: bytes, wire_type: type) -> BadRequest:
    text = _shortened(text)
    match = _PLACE.match(text)
    assert match is not None  # the pattern matches every text
    problem, path = match["problem"], (match["path"] or "").removeprefix(".")
    if field := _FIELD.search(problem):
        param = f"{path}.{field['name']}".removeprefix(".")
        if problem.startswith("Object missing"):
            return BadRequest(
                f"{param}: this field is required", param=param, code="missing_required_parameter"
            )
        return _unknown(param, field["name"], wire_type)
    name = path.rpartition(".")[2].partition("[")[0]
    found = _value_at(path, body)
    if name in REASONS and problem.startswith(("Expected `null`", "Invalid")):
        return BadRequest(f"{path}: {REASONS[name]}", param=path, code="unsupported_parameter")
    wanted = _wanted(problem, path)
    told = found is _MISSING or ", got" in problem or problem.startswith("Invalid")
    got = "" if told else f", got {_shown(found)}"
    key = " (a key of it)" if match["what"] == "key" else ""
    return BadRequest(
        f"{path or 'body'}{key}: {wanted}{got}", param=path or None, code="invalid_type_or_value"
    )


def _wanted(problem: str, path: str) -> str:
    if value := _VALUE.match(problem):
        if path.endswith("role"):
            return (
                f"{value['value']} is not system, developer, user or assistant (tool calls are not supported)"
            )
        if path.endswith("].type"):
            return f'{value["value"]} is not supported, only text parts are: {{"type": "text", "text": ...}}'
        return f"{value['value']} is not one of the values that are supported"
    return problem[:1].lower() + problem[1:]


def _unknown(param: str, name: str, wire_type: type) -> BadRequest:
    if name in REASONS:
        return BadRequest(f"{param}: {REASONS[name]}", param=param, code="unsupported_parameter")
    close = difflib.get_close_matches(name[:NAME_CHARACTERS], _names(wire_type), n=1)
    hint = f"did you mean `{close[0]}`?" if close and param == name else "leave it out"
    shown = param[: 2 * NAME_CHARACTERS]
    return BadRequest(f"{shown}: unknown field; {hint}", param=shown, code="unknown_parameter")


def _shortened(text: str) -> str:
    """msgspec's message, which quotes names and values of a body whole, without the middle of a long one."""
    return text if len(text) <= 1000 else f"{text[:500]}...{text[-400:]}"


def _names(wire_type: type) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(wire_type)]


def _value_at(path: str, body: bytes) -> Any:
    try:
        value = msgspec.json.decode(body)
        for step in _STEP.finditer(f".{path}" if path and not path.startswith("[") else path):
            value = value[step["name"]] if step["name"] else value[int(step["index"])]
    except (msgspec.MsgspecError, ValueError, LookupError, TypeError, RecursionError):
        return _MISSING
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list | dict):
        return f"{len(value)} entries"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
