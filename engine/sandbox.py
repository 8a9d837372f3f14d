"""A Jinja environment that a hostile chat template cannot escape, hang or fill memory with.

Immutable sandbox, and on top: every loop, call, filter and operator looks at one deadline, and every
operation that can make a long text from a short one is measured first. Knows nothing of chats.
"""

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEXT = 16 * 2**20  # characters, of the result and of every text on the way
MAX_RENDER_S = 5.0

_FILTERS = frozenset(
    """abs attr batch capitalize count d default dictsort e escape first float forceescape groupby int items
    last length list lower map max min reject rejectattr reverse round safe select selectattr slice sort
    string striptags sum title trim unique upper wordcount""".split()  # noqa: SIM905 - reads better
)
_TEXT_METHODS = frozenset(
    """capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper""".split()  # noqa: SIM905
)
_deadline: ContextVar[float] = ContextVar("deadline")


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile with `bounded_template`, print with `render`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Any]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        own = {"replace": _replace, "indent": _indent, "join": _join}
        allowed = {name: self.filters[name] for name in _FILTERS} | own | dict(filters)
        self.filters = {name: _timed(function) for name, function in allowed.items()}
        self.globals = {name: self.globals[name] for name in ("range", "dict", "namespace")} | dict(functions)

    def bounded_template(self, source: str) -> jinja2.Template:
        """Compile with every loop and every `~` of the source bounded."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _call("each", [loop.iter], loop.lineno)
        _replace_concats(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def render(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """The text, or SecurityError when it takes too long or gets too large."""
        token = _deadline.set(time.monotonic() + MAX_RENDER_S)
        try:
            return template.render(values)
        finally:
            _deadline.reset(token)

    @staticmethod
    def each(values: Iterable[Any]) -> Iterator[Any]:
        """What loops iterate over instead of `values`."""
        for value in values:
            _in_time()
            yield value

    @staticmethod
    def tilde(*values: Any) -> str:
        """What `~` calls."""
        return _concat([str(value) for value in values])

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How jinja2 puts the output of blocks, macros and the template itself together."""
        return _concat(list(pieces))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Texts keep the methods of a list; none that pads or formats."""
        if isinstance(obj, str | bytes) and attr not in _TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Calls of `replace` and `join` are measured before they run."""
        _in_time()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            if obj.__name__ == "replace":
                return _replace(owner, *args)
            if obj.__name__ == "join":
                return _join(args[0], owner)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%`, with a bound on what they make."""
        _in_time()
        if operator == "**" or (operator == "%" and isinstance(left, str | bytes)):
            raise SecurityError(f"{operator} is not computed in chat templates")
        if operator == "*":
            _fits(_size(left) * (abs(right) if isinstance(right, int) else 1))
            _fits(_size(right) * (abs(left) if isinstance(left, int) else 1))
        if operator == "+":
            _fits(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is printed as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _replace_concats(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _without_concat(value))
        elif isinstance(value, list):
            value[:] = [_without_concat(item) if isinstance(item, nodes.Node) else item for item in value]


def _without_concat(node: nodes.Node) -> nodes.Node:
    _replace_concats(node)
    return _call("tilde", node.nodes, node.lineno) if isinstance(node, nodes.Concat) else node


def _call(method: str, arguments: list[Any], lineno: int) -> nodes.Call:
    """A call of the sandbox's own method; no template can name or replace it."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=lineno)


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps jinja2's marks that say what the filter is passed
    def timed(*args: Any, **kwargs: Any) -> Any:
        _in_time()
        return function(*args, **kwargs)

    return timed


def _in_time() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError(f"rendering takes more than {MAX_RENDER_S:.0f} s")


def _size(value: Any) -> int:
    """Of a text or list its length; of a number its decimal digits, about."""
    if isinstance(value, int):
        return value.bit_length() // 3
    return len(value) if isinstance(value, str | bytes | list | tuple) else 0


def _fits(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"a text of {size} characters; at most {MAX_TEXT} are made")


def _concat(texts: list[str]) -> str:
    _fits(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: Any, old: Any, new: Any, count: int | None = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    _fits(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    return text.replace(old, new, -1 if count is None else count)


def _join(values: Iterable[Any], separator: Any = "", attribute: str | None = None) -> str:
    if attribute is not None:
        values = (value[attribute] for value in values)
    texts = [str(value) for value in values]
    _fits(sum(map(len, texts)) + len(str(separator)) * len(texts))
    return str(separator).join(texts)


def _indent(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """As jinja2's own, within the limit."""
    margin = width[:100] if isinstance(width, str) else " " * min(width, 100)
    lines = str(text).splitlines()
    _fits(len(str(text)) + len(margin) * len(lines))
    body = [margin + line if (line or blank) and (i or first) else line for i, line in enumerate(lines)]
    return "\n".join(body)
