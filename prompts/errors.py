"""The one exception of this floor."""

from pathlib import Path


class PromptError(Exception):
    """A prompt file, or what it was given, is wrong; says where and what to do."""

    def __init__(self, problem: str, *, path: Path | None = None, line: int | None = None) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}, line {line}: "
        super().__init__(where + problem)
        self.problem = problem
        self.path = path
        self.line = line

    def told(self) -> str:
        """The message for somebody who asks over a network: the prompt's name, not where its file lies."""
        if self.path is None:
            return self.problem
        place = f"the prompt {self.path.stem!r}" + ("" if self.line is None else f", line {self.line}")
        return f"{place}: {self.problem}"
