"""JSON schemas become grammars that allow nothing the schema forbids; here a tiny GBNF matcher proves it."""

import json
import re

import pytest

from engine.grammar import grammar_problem
from server.errors import BadRequest
from server.grammar import JSON_OBJECT
from server.json_schema import MAX_DEPTH, to_grammar


class Matcher:
    """Backtracking matcher for the GBNF that we write: literals, classes, groups, `|`, `* ? {m,n}`, names."""

    TOKEN = re.compile(r'\s*("(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|\{\d*,?\d*\}|[()|*?+]|[A-Za-z][\w-]*)')

    def __init__(self, grammar: str) -> None:
        self.rules = {}
        for line in filter(None, grammar.splitlines()):
            name, body = line.split(" ::= ", 1)
            self.rules[name] = self._alternatives(self.TOKEN.findall(body))

    def matches(self, text: str) -> bool:
        return any(end == len(text) for end in self._ends(("rule", "root"), text, 0))

    def _alternatives(self, tokens):
        options = [[]]
        while tokens and tokens[0] != ")":
            token = tokens.pop(0)
            if token == "|":
                options.append([])
                continue
            if token == "(":
                node = ("any", self._alternatives(tokens))
                tokens.pop(0)
            elif token[0] == '"':
                node = (
                    "text",
                    re.sub(r"\\(.)", lambda m: {"n": "\n", "r": "\r"}.get(m[1], m[1]), token[1:-1]),
                )
            elif token[0] == "[":
                node = ("class", re.compile(token))
            else:
                node = ("rule", token)
            while tokens and (tokens[0] in "*?+" or tokens[0][0] == "{"):
                mark = tokens.pop(0)
                low, high = {"*": (0, None), "?": (0, 1), "+": (1, None)}.get(mark) or self._counts(mark)
                node = ("repeat", node, low, high)
            options[-1].append(node)
        return options

    def _counts(self, mark):
        low, _, high = mark[1:-1].partition(",")
        return int(low or 0), int(high) if high else None

    def _ends(self, node, text, at):
        kind = node[0]
        if kind == "text":
            return {at + len(node[1])} if text.startswith(node[1], at) else set()
        if kind == "class":
            return {at + 1} if at < len(text) and node[1].match(text[at]) else set()
        if kind == "repeat":
            return self._repeated(node, text, at)
        options = self.rules[node[1]] if kind == "rule" else node[1]
        return set().union(*(self._sequence(option, text, at) for option in options))

    def _sequence(self, nodes, text, at):
        places = {at}
        for node in nodes:
            places = set().union(*(self._ends(node, text, place) for place in places)) if places else set()
        return places

    def _repeated(self, node, text, at):
        _, inner, low, high = node
        places, found, count = {at}, {at} if low == 0 else set(), 0
        while places and (high is None or count < high):
            places = set().union(*(self._ends(inner, text, place) for place in places)) - found
            count += 1
            found |= places if count >= low else set()
        return found


def grammar(schema) -> Matcher:
    return Matcher(to_grammar(schema, place="schema"))


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 2},
        "boss": {"$ref": "#"},
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [0, -12, 99], [1.5, "1", None]),
        ({"type": "number"}, [0, -1.5, 1e3], ["1", True]),
        ({"enum": ["x", 1, None]}, ["x", 1, None], ["y", 2]),
        ({"const": {"a": 'quote " and \\ slash'}}, [], [{"a": 1}]),
        ({"anyOf": [{"type": "null"}, {"type": "boolean"}]}, [None, True], ["null", 0]),
        ({"type": "array", "items": {"type": "integer"}}, [[], [1], [1, 2, 3]], [["a"], {}, [1, None]]),
        ({"type": "array", "maxItems": 0}, [[]], [[1]]),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            [{}, {"a": 1, "b": 2}],
            [{"a": "b"}],
        ),
        ({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
        ({}, [{"a": [1, {"b": None}]}, "x", 3], []),
        (
            PERSON,
            [
                {"name": "Ann", "tags": ["a"]},
                {"name": "한글", "age": None, "tags": ["b", "a"]},
                {"name": "Ann", "age": 3, "tags": ["a"], "boss": {"name": "Bo", "tags": ["b"]}},
            ],
            [
                {"name": "Ann"},
                {"name": "", "tags": ["a"]},
                {"name": "Annabel", "tags": ["a"]},
                {"name": "Ann", "tags": []},
                {"name": "Ann", "tags": ["a", "a", "a"]},
                {"name": "Ann", "tags": ["c"]},
                {"name": "Ann", "tags": ["a"], "extra": 1},
                {"name": "Ann", "tags": ["a"], "boss": {}},
            ],
        ),
        (
            {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}}},
            [{}, {"a": None}, {"b": None}, {"a": None, "b": None}],
            [{"c": None}, {"a": 1}],
        ),
    ],
)
def test_the_grammar_takes_what_the_schema_takes_and_nothing_else(schema, good, bad):
    matcher = grammar(schema)
    for value in good:
        for text in (json.dumps(value, ensure_ascii=False), json.dumps(value, separators=(",", ":"))):
            assert matcher.matches(text), text
    for value in bad:
        assert not matcher.matches(json.dumps(value, ensure_ascii=False)), value


def test_a_constant_is_matched_exactly():
    value = {"a": 'quote " and \\ slash'}
    assert grammar({"const": value}).matches(json.dumps(value))


def test_any_object_is_an_object():
    assert Matcher(JSON_OBJECT).matches('{"a": [1, "\\u00e9", {"b": null}]}')
    assert not Matcher(JSON_OBJECT).matches("[1]")
    assert not Matcher(JSON_OBJECT).matches('{"a": 1,}')


@pytest.mark.parametrize(
    ("schema", "param"),
    [
        ({"type": "string", "pattern": "a"}, "schema.pattern"),
        ({"type": "integer", "minimum": 3}, "schema.minimum"),
        ({"allOf": [{}]}, "schema.allOf"),
        ({"type": "strng"}, "schema.type"),
        ({"type": "object", "properties": {"a": {"format": "date"}}}, "schema.properties.a.format"),
        ({"type": "object", "properties": {"a": {}}, "required": ["b"]}, "schema.required"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "schema.minItems"),
        ({"type": "string", "maxLength": 10**9}, "schema.maxLength"),
        ({"$ref": "#/$defs/none"}, "schema.$ref"),
        ({"$ref": "http://x/y"}, "schema.$ref"),
        ({"enum": []}, "schema.enum"),
        ({"anyOf": {}}, "schema.anyOf"),
        ({"items": 3, "type": "array"}, "schema.items"),
        ({"$ref": []}, "schema.$ref"),
        ({"$ref": None}, "schema.$ref"),
        ({"type": {}}, "schema.type"),
        ({"type": [[]]}, "schema.type"),
        ({"type": []}, "schema.type"),
        ({"type": None}, "schema.type"),
        ({"type": "object", "properties": {"a": {}}, "required": [[]]}, "schema.required"),
        ({"type": "object", "properties": []}, "schema"),
        ({"type": "array", "minItems": None}, "schema.minItems"),
        ({"type": "array", "maxItems": None}, "schema.maxItems"),
        ({"type": "string", "minLength": {}}, "schema.minLength"),
        ({"type": "object", "additionalProperties": 3}, "schema.additionalProperties"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_its_path(schema, param):
    with pytest.raises(BadRequest) as error:
        to_grammar(schema, place="schema")
    assert error.value.param == param


def of(first, **definitions):
    """A schema with these $defs."""
    return first | {"$defs": definitions}


def ref(name):
    return {"$ref": f"#/$defs/{name}"}


#: b is met in an array first, where a may stand; later it may begin a.
CROSSED = of(
    ref("a"),
    a={"anyOf": [{"type": "array", "items": ref("b")}, ref("b")]},
    b={"anyOf": [ref("a"), {"type": "null"}]},
)


@pytest.mark.parametrize(
    ("schema", "param", "chain"),
    [
        ({"$ref": "#"}, "schema(#).$ref", "'#' -> '#'"),
        (
            of(ref("a"), a=ref("b"), b=ref("a")),
            "schema(#/$defs/b).$ref",
            "'#/$defs/a' -> '#/$defs/b' -> '#/$defs/a'",
        ),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "schema(#).anyOf[0].$ref", "'#' -> '#'"),
        ({"anyOf": [{"type": "null"}, {"anyOf": [{"$ref": "#"}]}]}, "schema(#).anyOf[1].anyOf[0].$ref", "#"),
        ({"type": "array", "items": of(ref("a")) | {"$ref": "#/items"}}, "schema(#/items).$ref", "'#/items'"),
        (CROSSED, "schema(#/$defs/a).anyOf[1].$ref", "'#/$defs/b' -> '#/$defs/a' -> '#/$defs/b'"),
    ],
)
def test_references_that_begin_with_themselves_are_refused_with_their_path(schema, param, chain):
    with pytest.raises(BadRequest, match="refers to itself with no object or array between") as error:
        to_grammar(schema, place="schema")
    assert error.value.param == param
    assert chain in str(error.value)


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (of({"type": "array", "items": {"$ref": "#"}}), [[], [[], [[]]]], [[1]]),
        ({"anyOf": [{"type": "null"}, {"type": "array", "items": {"$ref": "#"}}]}, [None, [None, []]], [1]),
        (of(ref("a"), a=ref("b"), b=ref("c"), c={"type": "integer"}), [3], ["3"]),
        (
            of(
                ref("a"),
                a={"anyOf": [{"type": "array", "items": ref("b")}, {"type": "null"}]},
                b={"anyOf": [ref("a"), {"type": "array", "items": ref("b")}]},
            ),
            [None, [None], [[None], []]],
            [1, [1]],
        ),
    ],
)
def test_references_that_come_back_inside_brackets_are_taken(schema, good, bad):
    matcher = grammar(schema)
    assert all(matcher.matches(json.dumps(value)) for value in good)
    assert not any(matcher.matches(json.dumps(value)) for value in bad)


def test_depth_is_bounded():
    schema: dict = {"type": "null"}
    for _ in range(40):
        schema = {"type": "array", "items": schema}
    with pytest.raises(BadRequest, match="deeper than 32"):
        to_grammar(schema, place="schema")


WRAPPINGS = {
    "array": (lambda inner: {"type": "array", "items": inner}, lambda inner: [inner, inner]),
    "map": (lambda inner: {"type": "object", "additionalProperties": inner}, lambda inner: {"k": inner}),
    "property": (
        lambda inner: {"type": "object", "properties": {"a": inner}},
        lambda inner: {"a": inner},
    ),
    "choice": (
        lambda inner: {"type": "array", "items": {"anyOf": [{"type": "null"}, inner]}},
        lambda inner: [None, inner],
    ),
}


def nested(wrapping: str, depth: int):
    """(schema, value that fits it) of a depth."""
    schema, value = {"type": "string", "maxLength": 3}, "abc"
    schema_of, value_of = WRAPPINGS[wrapping]
    for _ in range(depth):
        schema, value = schema_of(schema), value_of(value)
    return schema, value


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_the_deepest_schema_makes_a_small_grammar_that_the_engine_takes(wrapping):
    depth = MAX_DEPTH // 2 if wrapping == "choice" else MAX_DEPTH  # a choice in an array is two levels
    text = to_grammar(nested(wrapping, depth)[0], place="schema")
    assert len(text) < 50_000
    assert grammar_problem(text) is None


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_nested_parts_are_matched_as_deep_as_they_are_and_no_deeper(wrapping):
    schema, value = nested(wrapping, 4)
    matcher = grammar(schema)
    assert matcher.matches(json.dumps(value))
    for wrong in (nested(wrapping, 5)[1], nested(wrapping, 3)[1]):
        assert not matcher.matches(json.dumps(wrong))
    assert not matcher.matches(json.dumps(value).replace("abc", "abcd"))
