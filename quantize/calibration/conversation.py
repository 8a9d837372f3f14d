"""One conversation as token ids with roles, and the file that conversations are appended to as they finish.

The file survives a kill at any byte: a last line cut short is dropped when it is opened again. Knows
nothing of models.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from quantize.errors import QuantizeError

Role = Literal["template", "user", "assistant", "text"]


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one role."""

    role: Role
    n_tokens: int


@dataclass(frozen=True, slots=True)
class Conversation:
    """Token ids with true special tokens, one sequence, and who wrote which."""

    number: int
    seed: int
    temperature: float
    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    user: str = ""
    assistant: str = ""

    def count(self, role: Role) -> int:
        """Tokens of one role."""
        return sum(span.n_tokens for span in self.spans if span.role == role)

    def positions(self, role: Role) -> Iterator[int]:
        """Indexes of the tokens of one role."""
        start = 0
        for span in self.spans:
            if span.role == role:
                yield from range(start, start + span.n_tokens)
            start += span.n_tokens


@dataclass(frozen=True, slots=True)
class Rejected:
    """A conversation that a filter dropped, and why."""

    number: int
    reason: str


@dataclass(slots=True)
class Journal:
    """Conversations and rejections on disk, one JSON line each, after a line with their key."""

    path: Path
    accepted: list[Conversation] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path, *, key: str) -> "Journal":
        """Continue the file at `path` if it carries `key`, else begin it anew."""
        lines = _whole_lines(path)
        if not lines or lines[0].get("key") != key:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"key": key}) + "\n", "utf-8")
            return cls(path)
        journal = cls(path)
        for line in lines[1:]:
            if "reason" in line:
                journal.rejected.append(Rejected(**line))
            else:
                journal.accepted.append(parse(line))
        return journal

    @property
    def numbers(self) -> set[int]:
        """Numbers that need no second attempt."""
        return {c.number for c in self.accepted} | {r.number for r in self.rejected}

    def add(self, conversation: Conversation) -> None:
        """Append an accepted conversation."""
        self._append(asdict(conversation))
        self.accepted.append(conversation)

    def reject(self, number: int, reason: str) -> None:
        """Append why the conversation of a number was dropped."""
        self._append({"number": number, "reason": reason})
        self.rejected.append(Rejected(number, reason))

    def reasons(self) -> dict[str, int]:
        """How many each filter dropped, most first."""
        counts: dict[str, int] = {}
        for rejection in self.rejected:
            counts[rejection.reason] = counts.get(rejection.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def _append(self, value: Mapping[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(value, ensure_ascii=False) + "\n")
            file.flush()


def parse(line: Mapping) -> Conversation:
    """A conversation from its JSON object."""
    spans = tuple(Span(**span) for span in line["spans"])
    return Conversation(**{**line, "tokens": tuple(line["tokens"]), "spans": spans})


def read(path: Path) -> list[Conversation]:
    """The accepted conversations of a finished file, in the order of their numbers."""
    lines = _whole_lines(path)
    if not lines or "key" not in lines[0]:
        raise QuantizeError(f"{path} is not a conversation file of lq quantize; delete it and run again")
    found = [parse(line) for line in lines[1:] if "reason" not in line]
    return sorted(found, key=lambda conversation: conversation.number)


def windows(tokens: Sequence[int], *, size: int, limit: int, bos: int | None) -> list[Conversation]:
    """A text cut into sequences of up to `size` tokens, each with BOS where the model wants one.

    At most `limit` tokens are used, spread evenly over the text; a last piece of under size/4 is dropped.
    """
    room = size - (bos is not None)
    starts = [start for start in range(0, len(tokens), room) if len(tokens) - start >= min(room, size // 4)]
    wanted = max(1, limit // size)
    if len(starts) > wanted:
        starts = [starts[i * len(starts) // wanted] for i in range(wanted)]
    result = []
    for number, start in enumerate(starts):
        piece = tuple(tokens[start : start + room])
        prefix = () if bos is None else (bos,)
        spans = (*(Span("template", 1) for _ in prefix), Span("text", len(piece)))
        result.append(Conversation(number, 0, 0.0, (*prefix, *piece), spans))
    return result


def _whole_lines(path: Path) -> list[dict]:
    """The JSON objects of all finished lines; what follows the last newline is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        os.truncate(path, len(whole))
    try:
        # not splitlines(): the text of a model may hold U+2028, which it takes for the end of a line too
        return [json.loads(line) for line in whole.split(b"\n")[:-1]]
    except ValueError:
        return []
