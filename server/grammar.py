"""Pieces of GBNF, llama.cpp's grammar notation, for JSON."""

#: Rules that every JSON grammar may use. Space is bounded, as a small model would write it forever.
PRIMITIVES = {
    "ws": r'| " " | "\n" [ \t]{0,20}',
    "char": r'[^"\\\x7F\x00-\x1F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})',
    "string": r'"\"" char* "\""',
    "integer": r'"-"? ("0" | [1-9] [0-9]{0,15})',
    "number": r'"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,3})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "object": '"{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"',
    "array": '"[" ws (value ("," ws value)*)? ws "]"',
}


def text(rules: dict[str, str]) -> str:
    """A whole grammar: the rules, which include `root`, and the primitives."""
    return "\n".join(f"{name} ::= {body}" for name, body in (rules | PRIMITIVES).items()) + "\n"


def literal(value: str) -> str:
    """A GBNF literal that matches exactly this text."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "\\r")
    return f'"{escaped}"'


#: Any JSON object.
JSON_OBJECT = text({"root": "object"})
