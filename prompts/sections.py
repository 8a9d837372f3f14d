"""Cut the body of a prompt file into role-marked sections.

Reads the author's file alone. Rendered text is never cut again, so a source or a question that holds a line
`assistant:` stays text.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from prompts.errors import PromptError
from prompts.message import Role

ROLES = get_args(Role)
MARKER = re.compile(r"^\s*#*\s*(?P<role>[A-Za-z]+)\s*:\s*$")
#: Words that an author means as a role though this format has no such role.
FOREIGN_ROLES = frozenset({"developer", "tool", "function", "human", "ai", "context", "model"})


@dataclass(frozen=True, slots=True)
class Section:
    """One message template; `line` is the file's line number of its first line, from 1."""

    role: Role
    text: str
    line: int


def cut(body: str, *, first_line: int, path: Path) -> tuple[Section, ...]:
    """The sections of a body, in order; a body without markers is one user message."""
    found: list[tuple[str, int, list[str]]] = []
    for number, line in enumerate(body.split("\n"), start=first_line):
        role = _role_of(line, number, path)
        if role:
            found.append((role, number + 1, []))
        elif found:
            found[-1][2].append(line)
        elif line.strip():
            found.append(("user", number, [line]))
    sections = tuple(Section(cast(Role, role), "\n".join(lines), line) for role, line, lines in found)
    _check_order(sections, path)
    return sections


def _role_of(line: str, number: int, path: Path) -> str | None:
    match = MARKER.match(line)
    if match is None:
        return None
    role = match["role"].lower()
    if role in FOREIGN_ROLES:
        raise PromptError(f"role {role!r} is not one of {', '.join(ROLES)}", path=path, line=number)
    return role if role in ROLES else None


def _check_order(sections: tuple[Section, ...], path: Path) -> None:
    if not sections or sections[-1].role != "user":
        raise PromptError("the last message must be `user:`, it carries the question", path=path)
    for section in sections[1:]:
        if section.role == "system":
            problem = "`system:` comes first and once: move its text to the top"
            raise PromptError(problem, path=path, line=section.line - 1)
    turns = [section.role for section in sections if section.role != "system"]
    for position, role in enumerate(turns):
        if role != ("user", "assistant")[position % 2]:
            raise PromptError("`user:` and `assistant:` must take turns, starting with `user:`", path=path)
