"""The one exception of this floor."""

from pathlib import Path


class PromptError(Exception):
    """A prompt file, or what it was given, is wrong; says where and what to do."""

    def __init__(self, problem: str, *, path: Path | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}, line {line}: "
        super().__init__(where + problem)
        self.path = path
        self.line = line
