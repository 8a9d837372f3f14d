"""Bounds on a GBNF grammar before libllama parses it.

libllama descends recursively into groups and rules and unrolls repetitions: without bounds a short
text ends the process or fills memory. Whether the grammar means anything is libllama's to say.
"""

import re

MAX_BYTES = 256 * 1024
MAX_NESTING = 64
MAX_RULES = 10_000  # named ones, and those that groups and repetitions become
MAX_ELEMENTS = 4_000_000  # 8 bytes each, after repetitions are unrolled

#: Tokens, literals, classes and comments hide what is inside them; the rest shapes the grammar.
_PARTS = re.compile(
    r'<[^>]*>|"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*|\{\s*(\d*)\s*,?\s*(\d*)\s*\}|[()*+?]|::=',
    re.DOTALL,
)


def grammar_problem(text: str) -> str | None:
    """What is wrong with the size or nesting of the grammar, with the remedy; None when it may be parsed."""
    if "\0" in text:
        return "holds a NUL character: remove it"
    if "::=" not in text:
        return "has no rule: write at least `root ::= ...`"
    n_bytes = len(text.encode("utf-8", "replace"))
    if n_bytes > MAX_BYTES:
        return f"has {n_bytes} bytes; at most {MAX_BYTES} are taken"
    depth, rules, elements = _measure(text)
    for count, most, remedy in (
        (depth, MAX_NESTING, "levels of groups; name inner groups as rules"),
        (rules, MAX_RULES, "rules when unrolled; lower its repetition counts"),
        (elements, MAX_ELEMENTS, "elements when unrolled; lower its repetition counts"),
    ):
        if count > most:
            return f"has more than {most} {remedy}"
    return None


def _measure(text: str) -> tuple[int, int, int]:
    """(deepest group, rules after unrolling, bound on elements after unrolling)."""
    depth = deepest = rules = repeats = 0
    longest = 1
    for part in _PARTS.finditer(text):
        first = part[0][0]
        if first == "{":
            repeats += max(int(part[1] or 0), int(part[2] or 0))
        elif first in '"[':
            longest = max(longest, len(part[0]))
        elif first == ")":
            depth -= 1
        elif first not in "#<":
            rules += 1
            depth += first == "("
            deepest = max(deepest, depth)
    return deepest, rules + repeats, len(text) + longest * repeats
