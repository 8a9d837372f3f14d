"""Grammars that would end the process or fill memory are refused before libllama sees them."""

import pytest

from engine.grammar import MAX_NESTING, grammar_problem

JSON = r"""
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x7F\x00-\x1F] | "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        'root ::= "yes" | "no"',
        'root ::= "' + "(" * 5000 + '"',
        "root ::= [" + "(" * 5000 + "]",
        'root ::= "a" # ' + "(" * 5000,
        'root ::= "\\"' + "(" * 500 + '"',
        "root ::= " + "(" * MAX_NESTING + '"a"' + ")" * MAX_NESTING,
    ],
)
def test_ordinary_grammars_pass(text):
    assert grammar_problem(text) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000, "levels of groups"),
        ('root ::= <"> ' + "(" * 600 + ' <">', "levels of groups"),
        ("root ::= " + "(" * 500, "levels of groups"),
        ("root ::= " + '"a"{0,2000} ' * 6, "rules when unrolled"),
        ("\n".join(f"r{n} ::= r{n + 1}" for n in range(11_000)), "rules when unrolled"),
        ('root ::= "' + "a" * 9000 + '"{1000}', "elements when unrolled"),
        ("root ::= " + " " * 300_000, "bytes"),
        ("", "no rule"),
        ("hello", "no rule"),
        ('root ::= "a\0"', "NUL"),
    ],
)
def test_grammars_beyond_the_bounds_are_refused(text, problem):
    assert problem in (grammar_problem(text) or "")
