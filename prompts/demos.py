"""Demonstrations of a prompt: questions with the answers that the model should imitate.

Inline or in a data file beside the prompt; always the same ones in the same order, so that a server may reuse
the tokens in front of the question.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prompts.errors import PromptError
from prompts.front_matter import refuse_unknown, text_of
from prompts.message import Source

FILE_KEYS = ("file", "select", "k")
SOURCE_KEYS = ("title", "file", "page", "heading", "text")


@dataclass(frozen=True, slots=True)
class Demo:
    """One solved example; `variables` are the prompt's own inputs, `sources` what the answer rests on."""

    question: str
    answer: str
    sources: tuple[Source, ...]
    variables: Mapping[str, str]


def read(value: Any, *, inputs: Mapping[str, Any], path: Path) -> tuple[Demo, ...]:
    """Demos from the value of `metadata.lq.demos`: a list, or `{file, select, k}`."""
    if value is None:
        return ()
    if isinstance(value, list):
        return tuple(_demo(entry, f"metadata.lq.demos[{n}]", inputs, path) for n, entry in enumerate(value))
    if isinstance(value, str):
        value = {"file": value}
    if not isinstance(value, dict):
        raise PromptError("key `metadata.lq.demos` must be a list of demos or a `file:`", path=path)
    return _from_file(value, inputs, path)


def file_of(value: Any, path: Path) -> Path | None:
    """The data file that a value of `metadata.lq.demos` names; None for one that holds its demos itself."""
    name = value.get("file") if isinstance(value, dict) else value
    return path.parent / name if isinstance(name, str) else None


def _from_file(value: Mapping[str, Any], inputs: Mapping[str, Any], path: Path) -> tuple[Demo, ...]:
    refuse_unknown(value, FILE_KEYS, "metadata.lq.demos.", path)
    select = value.get("select", "static")
    if select != "static":
        problem = f"key `metadata.lq.demos.select`: {select!r} is not supported, only `static`"
        raise PromptError(problem, path=path)
    if "file" not in value:
        raise PromptError("key `metadata.lq.demos.file` is missing", path=path)
    data = path.parent / text_of(value["file"], "metadata.lq.demos.file", path)
    entries = _load(data, path)
    demos = tuple(_demo(entry, f"demo {n}", inputs, data) for n, entry in enumerate(entries, start=1))
    count = value.get("k", len(demos))
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(demos):
        problem = f"{count!r} is not between 1 and the {len(demos)} demos of {data.name}"
        raise PromptError(f"key `metadata.lq.demos.k`: {problem}", path=path)
    return demos[:count]


def _load(data: Path, prompt: Path) -> list[Any]:
    if not data.is_file():
        raise PromptError(f"the demo file {data.name} does not exist beside the prompt", path=prompt)
    text = data.read_text("utf-8")
    try:
        if data.suffix == ".jsonl":
            entries = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif data.suffix in {".json", ".yaml", ".yml"}:
            entries = yaml.safe_load(text)
        else:
            raise PromptError("a demo file ends in .yaml, .json or .jsonl", path=data)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise PromptError(f"cannot be read: {' '.join(str(error).split())}", path=data) from None
    if not isinstance(entries, list) or not entries:
        raise PromptError("must hold a list of at least one demo", path=data)
    return entries


def _demo(entry: Any, where: str, inputs: Mapping[str, Any], path: Path) -> Demo:
    if not isinstance(entry, dict):
        raise PromptError(f"{where} must have `question` and `answer`", path=path)
    refuse_unknown(entry, ("question", "answer", "sources", *inputs), f"{where}.", path)
    for key in ("question", "answer"):
        if not text_of(entry.get(key), f"{where}.{key}", path):
            raise PromptError(f"{where}.{key} is missing or empty", path=path)
    return Demo(
        question=text_of(entry["question"], f"{where}.question", path),
        answer=text_of(entry["answer"], f"{where}.answer", path),
        sources=_sources(entry.get("sources"), where, path),
        variables={key: text_of(entry[key], f"{where}.{key}", path) for key in inputs if key in entry},
    )


def _sources(value: Any, where: str, path: Path) -> tuple[Source, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise PromptError(f"{where}.sources must be a list", path=path)
    return tuple(
        _source(entry, n, f"{where}.sources[{n - 1}]", path) for n, entry in enumerate(value, start=1)
    )


def _source(value: Any, number: int, where: str, path: Path) -> Source:
    entry = {"text": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not entry.get("text"):
        raise PromptError(f"{where} must have `text`", path=path)
    refuse_unknown(entry, SOURCE_KEYS, f"{where}.", path)
    texts = {key: text_of(entry.get(key), f"{where}.{key}", path) for key in SOURCE_KEYS if key != "page"}
    page = entry.get("page")
    if page is not None and (isinstance(page, bool) or not isinstance(page, int)):
        raise PromptError(f"{where}.page must be a number, got {page!r}", path=path)
    title = texts["title"] or texts["file"] or f"Source {number}"
    return Source(number, title, texts["file"], page, texts["heading"] or None, texts["text"])
