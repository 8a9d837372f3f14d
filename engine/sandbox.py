"""A Jinja environment that a hostile chat template cannot escape, hang or fill memory with.

Immutable sandbox, and on top: every loop spends from one budget, and every operation that can make a
long text from a short one is measured first. Knows nothing of chats.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_TEXT = 16 * 2**20  # characters, of a result and of every text on the way
MAX_ITERATIONS = 1_000_000  # of all loops of one rendering together

_FILTERS = (
    "abs attr batch capitalize count d default dictsort e escape first float forceescape groupby int items "
    "join last length list lower map max min reject rejectattr reverse round safe select selectattr "
    "slice sort string striptags sum title trim unique upper wordcount"
)
_TEXT_METHODS = frozenset(
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper".split()
)


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is printed as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment of one process; templates compiled by `bounded_template` share nothing but it."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        self.filters = {name: self.filters[name] for name in _FILTERS.split()}
        self.filters |= {"replace": _replace, "indent": _indent, "join": _join, "tojson": None}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")}

    def bounded_template(self, source: str) -> jinja2.Template:
        """Compile with every loop and every `~` of the source bounded."""
        tree = self.parse(source)
        _bound(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Texts keep the methods of a list; none that pads or formats."""
        if isinstance(obj, str | bytes) and attr not in _TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls of `replace` and `join` are measured before they run."""
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            if obj.__name__ == "replace":
                return _replace(owner, *args, **kwargs)
            if obj.__name__ == "join":
                return _join(args[0], owner)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%`, with a bound on what they make."""
        if operator == "**":
            raise SecurityError("powers are not computed in chat templates")
        if operator == "%" and isinstance(left, str | bytes):
            raise SecurityError("texts are not formatted with % in chat templates")
        if operator == "*":
            _fits(_size(left) * abs(right) if isinstance(right, int) else 0)
            _fits(_size(right) * abs(left) if isinstance(left, int) else 0)
        if operator == "+":
            _fits(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


def _bound(tree: nodes.Template) -> None:
    """Rewrite in place: loops draw from the budget `lq_each`, `~` goes through `lq_concat`."""
    for loop in list(tree.find_all(nodes.For)):
        loop.iter = _call("lq_each", [loop.iter], loop.lineno)
    _replace_concats(tree)


def _replace_concats(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _without_concat(value))
        elif isinstance(value, list):
            value[:] = [_without_concat(item) if isinstance(item, nodes.Node) else item for item in value]


def _without_concat(node: nodes.Node) -> nodes.Node:
    _replace_concats(node)
    return _call("lq_concat", node.nodes, node.lineno) if isinstance(node, nodes.Concat) else node


def _call(name: str, arguments: list[nodes.Expr], lineno: int) -> nodes.Call:
    return nodes.Call(nodes.Name(name, "load"), arguments, [], None, None, lineno=lineno)


def rendering_globals() -> dict[str, Any]:
    """Functions that the rewritten template calls; fresh for each rendering, because the budget is spent."""
    budget = iter(range(MAX_ITERATIONS))

    def each(values: Iterable[Any] | Undefined) -> Iterator[Any]:
        for value in values:
            if next(budget, None) is None:
                raise SecurityError(f"the chat template loops more than {MAX_ITERATIONS} times")
            yield value

    return {"lq_each": each, "lq_concat": _concat}


def _size(value: Any) -> int:
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _fits(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(
            f"the chat template makes a text of {size} characters; at most {MAX_TEXT} are kept"
        )


def _concat(*values: Any) -> str:
    texts = [str(value) for value in values]
    _fits(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: Any, old: Any, new: Any, count: int | None = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    _fits(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        values = (value[attribute] for value in values)
    texts = [str(value) for value in values]
    _fits(sum(map(len, texts)) + len(separator) * len(texts))
    return str(separator).join(texts)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """As jinja2's own, within the limit."""
    margin = width[:100] if isinstance(width, str) else " " * min(width, 100)
    lines = str(text).splitlines()
    _fits(len(str(text)) + len(margin) * len(lines))
    body = [margin + line if (line or blank) and (i or first) else line for i, line in enumerate(lines)]
    return "\n".join(body)
