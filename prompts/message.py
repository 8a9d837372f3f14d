"""What goes into a prompt and what comes out: sources in, messages out.

Knows neither files nor templates.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; the role is a value beside the text, never read out of it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Source:
    """A retrieved passage as a template sees it; `id` is the number that an answer cites."""

    id: int
    title: str
    file: str
    page: int | None
    heading: str | None
    text: str
