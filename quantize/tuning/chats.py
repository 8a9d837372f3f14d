"""Read chats to learn from: a JSON object a line, as OpenAI's fine-tuning takes them.

Every line is checked before anything else happens; an error names file, line, field and value. Knows no
templates and no tokens.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantize.errors import QuantizeError

ROLES = ("system", "developer", "user", "assistant")
FIELDS = frozenset({"role", "content", "name", "weight"})


class BadChat(QuantizeError):
    """A line that is no chat to learn from."""

    def __init__(self, path: Path, line: int, problem: str, remedy: str) -> None:
        super().__init__(f"{path}, line {line}: {problem}; {remedy}")


class NoChats(QuantizeError):
    """A file that cannot be read as chats at all."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"--data {path}: {problem}; give a JSONL file with one chat a line: "
            '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
        )


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `learnt`: whether an assistant's turn counts for the loss."""

    role: str
    content: str
    learnt: bool


@dataclass(frozen=True, slots=True)
class Chat:
    """The messages of one line, counted from 1."""

    line: int
    messages: tuple[Message, ...]

    @property
    def text(self) -> str:
        """All that is said in it."""
        return json.dumps(self.turns, ensure_ascii=False)

    @property
    def turns(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        return [{"role": message.role, "content": message.content} for message in self.messages]


def read_chats(path: Path) -> list[Chat]:
    """All chats of a file, in its order; empty lines are skipped. Raises BadChat or NoChats."""
    if not path.is_file():
        raise NoChats(path, "is a folder" if path.is_dir() else "there is no such file")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes().count(b"\n", 0, error.start) + 1
        raise BadChat(path, line, f"byte {error.start} is not UTF-8", "save the file as UTF-8") from None
    # not splitlines(): the text of a chat may hold U+2028, which it takes for the end of a line too
    lines = enumerate(text.split("\n"), start=1)
    chats = [_chat(path, number, line) for number, line in lines if line.strip()]
    if not chats:
        raise NoChats(path, "it is empty")
    return chats


def _chat(path: Path, line: int, text: str) -> Chat:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({error}): {_shown(text)}"
        raise BadChat(path, line, problem, "write one JSON object a line") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        found = "is missing" if messages is None else f"is {_shown(messages)}"
        raise BadChat(path, line, f"messages {found}", 'give {"messages": [{"role": …, "content": …}, …]}')
    if value.get("tools") or value.get("functions"):
        raise BadChat(path, line, "tools are not supported", "leave out the chats that call tools")
    chat = Chat(line, tuple(_messages(path, line, messages)))
    if not any(message.learnt for message in chat.messages):
        problem = f"no assistant turn to learn from (roles: {', '.join(m.role for m in chat.messages)})"
        remedy = 'add a message with role "assistant" and some content, whose weight is not 0'
        raise BadChat(path, line, problem, remedy)
    return chat


def _messages(path: Path, line: int, messages: list[Any]) -> Iterator[Message]:
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise BadChat(path, line, f"{where} is {_shown(message)}", "give an object with role and content")
        for field in message.keys() - FIELDS:
            if message[field] is not None:
                problem = f"{where}.{field} is {_shown(message[field])}, which is not supported"
                raise BadChat(path, line, problem, f"leave {field} out, or leave out the chat")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise BadChat(path, line, f"{where}.role is {_shown(role)}", f"give one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise BadChat(path, line, f"{where}.content is {_shown(content)}", "give the text as a string")
        yield Message(role, content, role == "assistant" and _weight(path, line, where, message) > 0)


def _weight(path: Path, line: int, where: str, message: Mapping[str, Any]) -> int:
    weight = message.get("weight", 1)
    if weight not in (0, 1) or isinstance(weight, bool):
        problem = f"{where}.weight is {_shown(weight)}"
        raise BadChat(path, line, problem, "give 1 (learn this turn) or 0 (read it only)")
    if weight and not message["content"].strip():
        raise BadChat(path, line, f"{where}.content is empty", "write the answer, or give weight 0")
    return weight


def _shown(value: object) -> str:
    """A value for an error message, cut short."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return repr(text if len(text) <= 60 else text[:57] + "…")
