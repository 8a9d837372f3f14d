"""A JSON schema -> GBNF, so that whatever the model writes is valid against it.

The grammar may allow less than the schema (properties keep the schema's order, no undeclared ones); it never
allows more. Keywords that cannot be kept are refused by name; size and depth are bounded before any C code.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from server.errors import BadRequest
from server.grammar import literal, text

MAX_DEPTH = 32
MAX_NODES = 2000
MAX_REPEATS = 1000
#: How GBNF names a rule.
NAME = re.compile(r"[A-Za-z][A-Za-z0-9-]*")

ANNOTATIONS = frozenset(
    {"title", "description", "default", "examples", "example", "$schema", "$id", "$comment", "deprecated"}
    | {"readOnly", "writeOnly", "$defs", "definitions"}
)
KEYWORDS = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "number": frozenset(),
    "integer": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}


def to_grammar(schema: dict[str, Any], *, place: str) -> str:
    """The grammar of a schema; raises BadRequest naming the path of what cannot be kept."""
    converter = _Converter(schema, place)
    converter.rules["root"] = converter.visit(schema, place, 0)
    converter.check_references()
    return text(converter.rules)


class _Converter:
    def __init__(self, root: dict[str, Any], place: str) -> None:
        self.root = root
        self.place = place
        self.rules: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._nodes = 0
        self._within: str | None = None  # the reference whose beginning is visited; None inside brackets
        self._leads: dict[str, dict[str, str]] = {}  # reference -> those it may begin with, and their places

    def check_references(self) -> None:
        """Refuse references that lead to themselves with no object or array between: llama.cpp cannot."""
        ended: set[str] = set()
        for first in self._leads:
            path = [first]
            while path:
                onward = next((one for one in self._leads.get(path[-1], {}) if one not in ended), None)
                if onward in path:
                    place = self._leads[path[-1]][onward]
                    chain = " -> ".join(repr(one[:100]) for one in [*path[path.index(onward) :], onward][:5])
                    problem = f"{chain} refers to itself with no object or array between"
                    raise BadRequest(f"{place}.$ref: {problem}", param=f"{place}.$ref")
                if onward is None:
                    ended.add(path.pop())
                else:
                    path.append(onward)

    def named(self, expression: str) -> str:
        """A rule's name for what is written more than once, so that nesting never multiplies it."""
        if NAME.fullmatch(expression):
            return expression
        name = f"r{len(self.rules)}"
        self.rules[name] = expression
        return name

    def visit(self, schema: Any, place: str, depth: int) -> str:
        """A GBNF expression, safe to stand in a sequence."""
        self._nodes += 1
        if depth > MAX_DEPTH or self._nodes > MAX_NODES:
            problem = f"the schema is deeper than {MAX_DEPTH} or has more than {MAX_NODES} parts"
            raise BadRequest(f"{place}: {problem}", param=place)
        if schema is True or schema == {}:
            return "value"
        if not isinstance(schema, dict):
            raise BadRequest(f"{place}: must be an object, got {type(schema).__name__}", param=place)
        if "$ref" in schema:
            _only(schema, {"$ref"}, place)
            return self._reference(schema["$ref"], place, depth)
        if "const" in schema:
            _only(schema, {"const", "type"}, place)
            return _json_literal(schema["const"])
        if "enum" in schema:
            _only(schema, {"enum", "type"}, place)
            return self._enum(schema["enum"], place)
        if "anyOf" in schema:
            _only(schema, {"anyOf"}, place)
            return self._any_of(schema["anyOf"], place, depth)
        return self._typed(schema, place, depth)

    def _typed(self, schema: dict[str, Any], place: str, depth: int) -> str:
        kinds = _kinds(schema, place)
        _only(schema, {"type"}.union(*(KEYWORDS[kind] for kind in kinds)), place)
        parts = [self._of_kind(kind, schema, place, depth) for kind in kinds]
        return parts[0] if len(parts) == 1 else f"({' | '.join(parts)})"

    def _of_kind(self, kind: str, schema: dict[str, Any], place: str, depth: int) -> str:
        if kind in ("object", "array"):
            with self._beginning(None):
                build = self._object if kind == "object" else self._array
                return build(schema, place, depth)
        if kind == "string" and schema.keys() & KEYWORDS["string"]:
            low, high = _bounds(schema, "minLength", "maxLength", place)
            return f'"\\"" char{_repeat(low, high)} "\\""'
        return kind

    def _object(self, schema: dict[str, Any], place: str, depth: int) -> str:
        properties, required = _properties(schema, place)
        if not properties:
            return self._map(schema.get("additionalProperties", True), place, depth)
        pairs = []
        for name, inner in properties.items():
            value = self.named(self.visit(inner, f"{place}.properties.{name[:100]}", depth + 1))
            pairs.append((f'{_json_literal(name)} ":" ws {value}', name in required))
        return f'"{{" ws {self._members(pairs)} ws "}}"'

    def _members(self, pairs: list[tuple[str, bool]]) -> str:
        """Rules for the members in order, the optional ones left out or not, commas only between two."""
        head = f"m{len(self.rules)}"
        self.rules[head] = ""  # takes the name; nested objects took theirs before
        after = {False: '""', True: '""'}
        for number in reversed(range(len(pairs))):
            pair, required = pairs[number]
            now = {}
            for is_first in (True, False):
                comma = "" if is_first else '"," ws '
                taken = f"{comma}{pair} {after[False]}"
                name = f"{head}-{number}-{'first' if is_first else 'more'}"
                self.rules[name] = taken if required else f"{taken} | {after[is_first]}"
                now[is_first] = name
            after = now
        self.rules[head] = after[True]
        return head

    def _map(self, additional: Any, place: str, depth: int) -> str:
        if additional is False:
            return '"{" ws "}"'
        value = self.visit(additional, f"{place}.additionalProperties", depth + 1)
        pair = self.named(f'string ":" ws {value}')
        return f'"{{" ws ({pair} ("," ws {pair})*)? ws "}}"'

    def _array(self, schema: dict[str, Any], place: str, depth: int) -> str:
        item = self.named(self.visit(schema.get("items", True), f"{place}.items", depth + 1))
        low, high = _bounds(schema, "minItems", "maxItems", place)
        if high == 0:
            return '"[" ws "]"'
        more = _repeat(max(low - 1, 0), None if high is None else high - 1)
        items = f'{item} ("," ws {item}){more}'
        return f'"[" ws {items} ws "]"' if low else f'"[" ws ({items})? ws "]"'

    def _enum(self, values: Any, place: str) -> str:
        if not isinstance(values, list) or not values:
            raise BadRequest(f"{place}.enum: must be a list of at least one value", param=f"{place}.enum")
        return f"({' | '.join(_json_literal(value) for value in values)})"

    def _any_of(self, options: Any, place: str, depth: int) -> str:
        if not isinstance(options, list) or not options:
            raise BadRequest(f"{place}.anyOf: must be a list of at least one schema", param=f"{place}.anyOf")
        parts = [self.visit(each, f"{place}.anyOf[{n}]", depth + 1) for n, each in enumerate(options)]
        return f"({' | '.join(parts)})"

    def _reference(self, reference: Any, place: str, depth: int) -> str:
        if not isinstance(reference, str):
            raise BadRequest(f"{place}.$ref: must be text such as '#/$defs/name'", param=f"{place}.$ref")
        if self._within is not None:
            self._leads.setdefault(self._within, {}).setdefault(reference, place)
        if reference in self._references:
            return self._references[reference]
        target: Any = self.root
        first, *steps = reference.split("/")
        for step in steps:
            target = (
                target.get(step.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            )
        if first != "#" or target is None:
            problem = f"{reference[:100]!r} is not in this schema"
            raise BadRequest(f"{place}.$ref: {problem}", param=f"{place}.$ref")
        name = f"ref{len(self._references)}"
        self._references[reference] = name
        with self._beginning(reference):
            self.rules[name] = self.visit(target, f"{self.place}({reference[:100]})", depth + 1)
        return name

    @contextmanager
    def _beginning(self, reference: str | None) -> Iterator[None]:
        """While the parts that a reference may begin with are visited, or those inside brackets (None)."""
        outside, self._within = self._within, reference
        try:
            yield
        finally:
            self._within = outside


def _kinds(schema: dict[str, Any], place: str) -> list[str]:
    """The JSON types of a schema, each once."""
    kinds = schema.get("type", _implied(schema))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    for kind in kinds or [None]:
        if not isinstance(kind, str) or kind not in KEYWORDS:
            shown = repr(kind[:100]) if isinstance(kind, str) else f"a value of type {type(kind).__name__}"
            problem = f"{shown} is not a JSON type; known: {', '.join(KEYWORDS)}"
            raise BadRequest(f"{place}.type: {problem}", param=f"{place}.type")
    return list(dict.fromkeys(kinds))


def _properties(schema: dict[str, Any], place: str) -> tuple[dict[str, Any], set[str]]:
    """(properties, the names of those that are required)."""
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise BadRequest(f"{place}: `properties` is an object and `required` a list", param=place)
    for name in required:
        if not isinstance(name, str) or name not in properties:
            shown = repr(name[:100]) if isinstance(name, str) else f"a value of type {type(name).__name__}"
            raise BadRequest(f"{place}.required: {shown} is no property", param=f"{place}.required")
    return properties, set(required)


def _implied(schema: dict[str, Any]) -> list[str] | str:
    for kind in ("object", "array", "string"):
        if schema.keys() & KEYWORDS[kind]:
            return kind
    return ["object", "array", "string", "number", "boolean", "null"]


def _only(schema: dict[str, Any], known: set[str], place: str) -> None:
    for key in schema:
        if key not in known and key not in ANNOTATIONS:
            param = f"{place}.{key[:100]}"
            problem = f"the keyword {key[:100]!r} cannot be kept here; leave it out and check it yourself"
            raise BadRequest(f"{param}: {problem}", param=param, code="unsupported_schema")


def _bounds(schema: dict[str, Any], low_key: str, high_key: str, place: str) -> tuple[int, int | None]:
    for key in (low_key, high_key):
        value = schema.get(key, 0)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_REPEATS:
            shown = value if isinstance(value, int | float) else f"a value of type {type(value).__name__}"
            problem = f"{shown} is not a whole number from 0 to {MAX_REPEATS}"
            raise BadRequest(f"{place}.{key}: {problem}", param=f"{place}.{key}")
    low, high = schema.get(low_key, 0), schema.get(high_key)
    if high is not None and low > high:
        raise BadRequest(f"{place}.{low_key}: {low} is above {high_key} {high}", param=f"{place}.{low_key}")
    return low, high


def _repeat(low: int, high: int | None) -> str:
    return f"{{{low},{'' if high is None else high}}}"


def _json_literal(value: Any) -> str:
    return literal(json.dumps(value, ensure_ascii=False))
