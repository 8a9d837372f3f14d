"""What a search returns: a passage of a file, with the place it came from and how well it matched."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk of one file. Offsets are characters of the file's parsed text: `text == parsed[start:end]`.

    `page` is the page on which the chunk begins (None for formats without pages); `page_at` tells the
    page of any offset in it. `best` is the span of the part that matched the question best.
    `score` is 0..1, higher is better, comparable within one search only.
    """

    id: str
    text: str
    file: str
    path: str
    title: str
    heading: str
    page: int | None
    start: int
    end: int
    score: float
    best: tuple[int, int]
    pages: tuple[tuple[int, int], ...] = ()  # (offset where the page begins, page number), ascending

    def page_at(self, offset: int) -> int | None:
        """The page that holds a character offset of the parsed text."""
        numbers = [number for begins, number in self.pages if begins <= offset]
        return numbers[-1] if numbers else self.page

    @property
    def snippet(self) -> str:
        """The part of the text that matched best."""
        first, last = self.best
        return self.text[first - self.start : last - self.start].strip()
