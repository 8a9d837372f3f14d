"""A prompt file rendered to chat messages: system -> demonstrations -> history -> context and question.

The order is by stability, so that a server can reuse the tokens of what did not change. Every message is
rendered on its own in an immutable sandbox where an unset variable is an error; nothing is ever parsed back
out of rendered text. Knows neither retrieval nor tokens.
"""

import difflib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from prompts import demos as demo_files
from prompts import front_matter, sections
from prompts.demos import Demo
from prompts.errors import PromptError
from prompts.front_matter import FrontMatter
from prompts.message import Message, Source
from prompts.sections import Section

LIBRARY = Path(__file__).parent / "library"
SUFFIX = ".prompt"
#: Names are compared and quoted up to here.
NAME_CHARACTERS = 100
#: Parts of the head that a template can place by name, or all at once as `instructions`.
PARTS = ("persona", "goal", "rules", "steps", "output")
GIVEN = ("question", "sources", "instructions", *PARTS)

_environment = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
)

Stamp = tuple[int, int]  # (time of the last change in ns, bytes)

#: By path: the prompt, and what its files were when it was read.
_loaded: dict[Path, tuple["Prompt", dict[Path, Stamp | None]]] = {}


@dataclass(frozen=True, slots=True)
class Prompt:
    """A loaded prompt file; rendering it touches no file."""

    path: Path
    head: FrontMatter
    sections: tuple[Section, ...]
    demos: tuple[Demo, ...]
    variables_used: frozenset[str]

    @property
    def name(self) -> str:
        return self.head.name

    @property
    def uses_sources(self) -> bool:
        """Whether the template has a place for retrieved passages."""
        return "sources" in self.variables_used

    def render(
        self,
        *,
        question: str,
        sources: Sequence[Source] = (),
        history: Sequence[Message] = (),
        variables: Mapping[str, str] | None = None,
    ) -> list[Message]:
        """Messages ready for a chat template; `history` holds earlier user and assistant turns."""
        if sources and not self.uses_sources:
            raise PromptError("has no place for sources: use `{{ sources }}`, or `grounded`", path=self.path)
        values = self._values(variables or {})
        *before, last = self.sections
        messages = [self._message(section, question, sources, values) for section in before]
        for demo in self.demos:
            shown = self._message(last, demo.question, demo.sources, values | dict(demo.variables))
            messages += [shown, Message("assistant", demo.answer)]
        messages += history
        messages.append(self._message(last, question, sources, values))
        return [message for message in messages if message.role != "system" or message.content]

    def _values(self, variables: Mapping[str, str]) -> dict[str, str]:
        known = self.head.inputs
        for name in variables:
            if name not in known:
                shown = name[:NAME_CHARACTERS]
                close = difflib.get_close_matches(shown, known, n=1)
                hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(known) or 'none'}"
                raise PromptError(f"has no variable `{shown}`: {hint}", path=self.path)
        defaults = {name: entry.default for name, entry in known.items() if entry.default is not None}
        values = defaults | dict(variables)
        missing = [name for name in known if name not in values]
        if missing:
            raise PromptError(f"variable `{missing[0]}` is not set and has no default", path=self.path)
        return values

    def _message(
        self, section: Section, question: str, sources: Sequence[Source], values: Mapping[str, str]
    ) -> Message:
        parts: dict[str, Any] = {name: getattr(self.head, name) for name in PARTS}
        given = {"instructions": self.head.instructions(), "question": question, "sources": list(sources)}
        # Blank lines in front keep Jinja's line numbers those of the file.
        source = "\n" * (section.line - 1) + section.text
        try:
            rendered = _compiled(source).render(**parts, **values, **given)
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError) as error:
            raise PromptError(str(error), path=self.path, line=_line_of(error)) from None
        return Message(section.role, rendered.strip())


@lru_cache(maxsize=256)
def _compiled(source: str) -> jinja2.Template:
    return _environment.from_string(source)


def load(name_or_path: str, *, folder: Path | None = None) -> Prompt:
    """A prompt by name (from `folder` first, then the shipped library) or by the path of its file.

    Its files are read again only when one of them has changed.
    """
    path = _find(name_or_path, folder)
    known = _loaded.get(path)
    if known is None or any(_stamp(file) != stamp for file, stamp in known[1].items()):
        known = _loaded[path] = _read(path)
    return known[0]


def _read(path: Path) -> tuple[Prompt, dict[Path, Stamp | None]]:
    """The prompt, and its files as they were just before each was read."""
    stamps = {path: _stamp(path)}
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"is not UTF-8 text (byte {error.start})", path=path) from None
    head_values, body, first_line = front_matter.split(text, path)
    head = front_matter.read(head_values, path)
    found = sections.cut(body, first_line=first_line, path=path)
    used = frozenset().union(*(_variables(section, path) for section in found))
    _check_variables(head, found, used, path)
    if data := demo_files.file_of(head.demos, path):
        stamps[data] = _stamp(data)
    demos = demo_files.read(head.demos, inputs=head.inputs, path=path)
    return Prompt(path, head, found, demos, used), stamps


def _stamp(path: Path) -> Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def names(*, folder: Path | None = None) -> list[str]:
    """Every name that `load` knows, sorted."""
    folders = [LIBRARY] if folder is None else [folder, LIBRARY]
    return sorted({path.stem for place in folders for path in place.glob(f"*{SUFFIX}")})


def _find(name_or_path: str, folder: Path | None) -> Path:
    if "/" in name_or_path or "\\" in name_or_path or name_or_path.endswith(SUFFIX):
        path = Path(name_or_path)
        if not path.is_file():
            raise PromptError("no such prompt file", path=path)
        return path
    for place in (folder, LIBRARY):
        if place is not None and (path := place / f"{name_or_path}{SUFFIX}").is_file():
            return path
    known = names(folder=folder)
    shown = name_or_path[:NAME_CHARACTERS]
    close = difflib.get_close_matches(shown, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise PromptError(f"no prompt named {shown!r}: {hint} (or give the path of a {SUFFIX} file)")


def _variables(section: Section, path: Path) -> set[str]:
    try:
        return meta.find_undeclared_variables(_environment.parse("\n" * (section.line - 1) + section.text))
    except jinja2.TemplateSyntaxError as error:
        raise PromptError(f"template: {error.message}", path=path, line=error.lineno) from None


def _check_variables(head: FrontMatter, found: tuple[Section, ...], used: frozenset[str], path: Path) -> None:
    for name in sorted(used - {*GIVEN, *head.inputs}):
        problem = f"variable `{name}` is not declared: add it under `inputs:` (given: {', '.join(GIVEN)})"
        raise PromptError(problem, path=path)
    for name in head.inputs:
        if name in GIVEN:
            raise PromptError(f"key `inputs.{name}`: the name is taken, choose another", path=path)
    if "question" not in _variables(found[-1], path):
        raise PromptError("the last `user:` message must use `{{ question }}`", path=path)
    for name in PARTS:
        if getattr(head, name) and not used & {name, "instructions"}:
            problem = f"`metadata.lq.{name}` is never used: put `{{{{ instructions }}}}` below `system:`"
            raise PromptError(problem, path=path)


def _line_of(error: Exception) -> int | None:
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)
