"""A Jinja environment that a hostile chat template cannot escape, hang or fill memory with.

Immutable sandbox, and on top: every loop, call, filter and operator looks at one deadline, every operation
that can make a long text from a short one is measured first, and lists that hold one another are weighed as
they would print: shared parts count each time. Knows nothing of chats.
"""

import functools
import time
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import jinja2
from jinja2 import filters as jinja_filters
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEXT = 16 * 2**20  # characters, of the result and of every text on the way
MAX_RENDER_S = 5.0
_ITEM = 8  # what an item of a list weighs beside itself, in characters
_MAX_BITS = 10_000  # of a whole number
_MAX_DECIMALS = 100

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
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)


@dataclass(slots=True)
class _Rendering:
    """One rendering: when it must be over, and what the lists on the way weigh.

    A list that was weighed is held, so that no other takes its id while its weight is known; `held` counts
    the memory that this may cost.
    """

    deadline: float
    known: dict[int, tuple[Any, int]] = field(default_factory=dict)
    held: int = 0

    def remember(self, value: Any, weight: int, texts: int = 0) -> None:
        """`texts`: characters in it that no other list known holds."""
        if self.held > MAX_TEXT:
            self.known.clear()
            self.held = 0
        self.known[id(value)] = value, weight
        self.held += _ITEM * (1 + len(value)) + texts


_rendering: ContextVar[_Rendering] = ContextVar("rendering")


class Variables(Namespace):
    """What `namespace()` makes: as jinja2's own, but never printed with what it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile with `bounded_template`, print with `render`."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, *, filters: Mapping[str, Callable[..., Any]], functions: Mapping[str, Any]) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        own = {"replace": _replace, "indent": _indent, "join": _join}
        own |= {"batch": _batch, "slice": _slice, "round": _round}
        allowed = {name: self.filters[name] for name in _FILTERS} | own | dict(filters)
        self.filters = {name: _timed(function) for name, function in allowed.items()}
        given = {"range": self.globals["range"], "dict": dict, "namespace": Variables}
        self.globals = given | dict(functions)

    def bounded_template(self, source: str) -> jinja2.Template:
        """Compile with every loop, every `~` and every list of the source bounded."""
        tree = self.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _call("each", [loop.iter], loop.lineno)
        _bound_inner(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def render(self, template: jinja2.Template, values: Mapping[str, Any]) -> str:
        """The text, or SecurityError when it takes too long or gets too large."""
        token = _rendering.set(_Rendering(time.monotonic() + MAX_RENDER_S))
        try:
            return template.render(values)
        finally:
            _rendering.reset(token)

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
    def made(value: Any) -> Any:
        """What a list, tuple or dictionary written in the template passes through."""
        return _weighed(value)

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
        """Calls of `replace` and `join` are measured before they run, all others by what goes in and out."""
        _in_time()
        _fits(sum(map(_weight, args)) + sum(map(_weight, kwargs.values())))  # macros keep them as lists
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            if obj.__name__ == "replace":
                return _replace(owner, *args)
            if obj.__name__ == "join":
                return _join(args[0], owner)
        return _weighed(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%`, with a bound on what they make."""
        _in_time()
        if operator == "**" or (operator == "%" and isinstance(left, str | bytes)):
            raise SecurityError(f"{operator} is not computed in chat templates")
        size = _weight(left) + _weight(right)
        if operator == "*":
            size = _product_weight(left, right)
        _fits(size)
        result = super().call_binop(context, operator, left, right)
        if isinstance(result, list | tuple):
            _rendering.get().remember(result, size)
        return result


class Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is printed as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _bound_inner(node: nodes.Node) -> None:
    for name, value in list(node.iter_fields()):
        if isinstance(value, nodes.Node):
            setattr(node, name, _bounded(value))
        elif isinstance(value, list):
            value[:] = [_bounded(item) if isinstance(item, nodes.Node) else item for item in value]


def _bounded(node: nodes.Node) -> nodes.Node:
    _bound_inner(node)
    if isinstance(node, nodes.Concat):
        return _call("tilde", node.nodes, node.lineno)
    if isinstance(node, nodes.Tuple) and node.ctx != "load":
        return node  # names that are assigned
    if isinstance(node, nodes.List | nodes.Tuple):
        plain = all(isinstance(item, nodes.Const) for item in node.items)
        return node if plain else _call("made", [node], node.lineno)
    return _call("made", [node], node.lineno) if isinstance(node, nodes.Dict) else node


def _call(method: str, arguments: list[Any], lineno: int) -> nodes.Call:
    """A call of the sandbox's own method; no template can name or replace it."""
    return nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None, lineno=lineno)


def _timed(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # keeps jinja2's marks that say what the filter is passed
    def timed(*args: Any, **kwargs: Any) -> Any:
        _in_time()
        return _weighed(function(*args, **kwargs))

    return timed


def _in_time() -> None:
    if time.monotonic() > _rendering.get().deadline:
        raise SecurityError(f"rendering takes more than {MAX_RENDER_S:.0f} s")


def _weighed(value: Any) -> Any:
    """The value itself, unless it is too large."""
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise SecurityError(f"a number of more than {_MAX_BITS} bits is not computed in chat templates")
    if isinstance(value, _CONTAINERS):
        _fits(_weight(value))
    return value


def _weight(value: Any) -> int:
    """About the characters that the value would print as."""
    if isinstance(value, str | bytes):
        return len(value)
    if not isinstance(value, _CONTAINERS):
        return 1
    rendering = _rendering.get()
    known = rendering.known.get(id(value))
    if known is not None:
        return known[1]
    items = value.items() if isinstance(value, dict) else value
    weight = _ITEM + sum(_ITEM + _weight(item) for item in items)
    texts = sum(len(item) for item in items if isinstance(item, str | bytes))
    rendering.remember(value, weight, texts)
    return weight


def _product_weight(left: Any, right: Any) -> int:
    """What `left * right` would weigh: numbers by their size, a text or list once for each time."""
    if isinstance(left, int) and isinstance(right, int):
        return MAX_TEXT + 1 if left.bit_length() + right.bit_length() > _MAX_BITS else 1
    times, repeated = (left, right) if isinstance(left, int) else (right, left)
    return _weight(repeated) * max(1, times if isinstance(times, int) else 1)


def _fits(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"a text of {size} characters; at most {MAX_TEXT} are made")


def bounded_text(pieces: Iterable[str]) -> str:
    """All pieces together, counted while they are made."""
    texts, size = [], 0
    for piece in pieces:
        _in_time()
        size += len(piece)
        _fits(size)
        texts.append(piece)
    return "".join(texts)


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


def _slice(values: Collection[Any], slices: int, fill_with: Any = None) -> Iterator[list[Any]]:
    _fits(slices * _ITEM)
    return jinja_filters.sync_do_slice(values, slices, fill_with)


def _batch(values: Iterable[Any], linecount: int, fill_with: Any = None) -> Iterator[list[Any]]:
    _fits(linecount * _ITEM)
    return jinja_filters.do_batch(values, linecount, fill_with)


def _round(value: float, precision: int = 0, method: Literal["common", "ceil", "floor"] = "common") -> float:
    if abs(precision) > _MAX_DECIMALS:
        raise SecurityError(f"round to {precision} decimals: at most {_MAX_DECIMALS}")
    return jinja_filters.do_round(value, precision, method)
