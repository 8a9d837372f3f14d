"""The YAML head of a prompt file: a subset of Prompty's keys, and ours under `metadata.lq`.

Every key is known or refused by name. Knows nothing of Jinja.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prompts.errors import PromptError

FENCE = "---"
HEAD_KEYS = ("name", "description", "authors", "tags", "version", "inputs", "sample", "metadata")
LQ_KEYS = ("persona", "goal", "rules", "steps", "output", "demos")
INPUT_KEYS = ("type", "description", "default")
#: Prompty keys that would change the answer if they were ignored.
ELSEWHERE = {
    "model": "choose the model on the command line, in the request or in an assistant of lq.toml",
    "template": "the template language is always Jinja",
    "tools": "tools are not supported",
    "base": "inheritance is not supported; copy the file",
}


@dataclass(frozen=True, slots=True)
class Input:
    """A variable that the caller may set; without a default it must be set."""

    description: str
    default: str | None


@dataclass(frozen=True, slots=True)
class FrontMatter:
    """The checked head of a prompt file."""

    name: str
    description: str
    inputs: Mapping[str, Input]
    persona: str
    goal: str
    rules: tuple[str, ...]
    steps: tuple[str, ...]
    output: str
    demos: Any  # checked by prompts.demos, which may read another file

    def instructions(self) -> str:
        """Persona, goal, rules, steps and output as one block; what is absent leaves no trace."""
        blocks = [" ".join(text for text in (self.persona, self.goal) if text)]
        if self.rules:
            blocks.append("\n".join(["Rules:", *(f"- {rule}" for rule in self.rules)]))
        if self.steps:
            blocks.append("\n".join(["Steps:", *(f"{n}. {step}" for n, step in enumerate(self.steps, 1))]))
        if self.output:
            blocks.append(f"Output: {self.output}")
        return "\n\n".join(block for block in blocks if block)


def split(text: str, path: Path) -> tuple[Mapping[str, Any], str, int]:
    """(head as a mapping, body, line number of the body's first line)."""
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    if lines[0].strip() != FENCE:
        return {}, "\n".join(lines), 1
    for index, line in enumerate(lines[1:], start=1):
        if line.strip() == FENCE:
            head = _load_yaml("\n".join(lines[1:index]), path)
            return head, "\n".join(lines[index + 1 :]), index + 2
    raise PromptError("the front matter is never closed: add a line `---`", path=path, line=1)


def _load_yaml(text: str, path: Path) -> Mapping[str, Any]:
    try:
        head = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or "cannot be read"
        line = mark.line + 2 if mark else 1
        raise PromptError(f"the front matter is not YAML: {problem}", path=path, line=line) from None
    if not isinstance(head, dict):
        raise PromptError("the front matter must be `key: value` lines", path=path, line=1)
    return head


def read(head: Mapping[str, Any], path: Path) -> FrontMatter:
    """Check every key of the head; unknown ones are refused with the nearest known name."""
    for key in head:
        if key in ELSEWHERE:
            raise PromptError(f"key `{key}`: {ELSEWHERE[key]}", path=path)
    refuse_unknown(head, HEAD_KEYS, "", path)
    metadata = mapping(head.get("metadata"), "metadata", path)
    ours = mapping(metadata.get("lq"), "metadata.lq", path)
    refuse_unknown(ours, LQ_KEYS, "metadata.lq.", path)
    return FrontMatter(
        name=text_of(head.get("name"), "name", path) or path.stem,
        description=text_of(head.get("description"), "description", path),
        inputs=_inputs(head.get("inputs"), path),
        persona=text_of(ours.get("persona"), "metadata.lq.persona", path),
        goal=text_of(ours.get("goal"), "metadata.lq.goal", path),
        rules=_list_of(ours.get("rules"), "metadata.lq.rules", path),
        steps=_list_of(ours.get("steps"), "metadata.lq.steps", path),
        output=text_of(ours.get("output"), "metadata.lq.output", path),
        demos=ours.get("demos"),
    )


def refuse_unknown(found: Mapping[str, Any], known: Iterable[str], prefix: str, path: Path) -> None:
    """Raise for the first key that is not known."""
    known = tuple(known)
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean `{prefix}{close[0]}`?" if close else f"known: {', '.join(known)}"
            raise PromptError(f"unknown key `{prefix}{key}`: {hint}", path=path)


def mapping(value: Any, key: str, path: Path) -> Mapping[str, Any]:
    """The value as a mapping; absent is empty."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise PromptError(f"key `{key}` must be a mapping, got {type(value).__name__}", path=path)
    return value


def text_of(value: Any, key: str, path: Path) -> str:
    """The value as stripped text; absent is empty. Numbers are text too, as YAML reads `404` as one."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise PromptError(f"key `{key}` must be text, got {type(value).__name__}: quote it", path=path)
    return str(value).strip()


def _list_of(value: Any, key: str, path: Path) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise PromptError(f"key `{key}` must be a list of lines, each after `- `", path=path)
    return tuple(text_of(item, f"{key}[{index}]", path) for index, item in enumerate(value))


def _inputs(value: Any, path: Path) -> Mapping[str, Input]:
    inputs = {}
    for name, entry in mapping(value, "inputs", path).items():
        key = f"inputs.{name}"
        if not str(name).isidentifier():
            raise PromptError(f"key `{key}`: a variable is letters, digits and underscores", path=path)
        if not isinstance(entry, dict):
            inputs[name] = Input("", None if entry is None else text_of(entry, key, path))
            continue
        refuse_unknown(entry, INPUT_KEYS, f"{key}.", path)
        if entry.get("type", "string") != "string":
            raise PromptError(f"key `{key}.type`: {entry['type']!r} is not `string`", path=path)
        default = text_of(entry["default"], f"{key}.default", path) if "default" in entry else None
        inputs[name] = Input(text_of(entry.get("description"), f"{key}.description", path), default)
    return inputs
