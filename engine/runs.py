"""Cut a text so that no run of like characters is long.

llama.cpp splits the words of most BPE vocabularies with std::regex, which recurses once a character of a
match: some 30,000 letters, spaces, digits or signs in a row end the process. Texts without such runs are not
touched. Knows no tokens.
"""

import itertools
import re
import unicodedata

LONGEST_RUN = 4096  # characters; far more than any word, and an eighth of what a stack of 8 MiB takes

# White space of Unicode, and so of llama.cpp; Python's has four separators more, which are signs there.
_SPACE, _OTHER = r"[^\S\x1c-\x1f]", r"[\S\x1c-\x1f]"
# Looked for at the beginnings of runs only, so that every character is read once.
_LONG = re.compile(
    rf"(?<!{_OTHER}){_OTHER}{{{LONGEST_RUN + 1},}}|(?P<space>(?<!{_SPACE}){_SPACE}{{{LONGEST_RUN + 1},}})"
)


def without_long_runs(text: str, *, mixed: bool = False) -> list[str]:
    """The text in parts, at best one; joined they are the text.

    Like characters are letters, digits, white space or others. `mixed`: letters, digits and others are all
    alike, for vocabularies that split at spaces alone. Parts of a run are about equally long, so that a cut
    is never near its ends, where a special token may begin or end.
    """
    cuts: list[int] = []
    for found in _LONG.finditer(text):
        classes = _classes(found.group(), alike=mixed or found["space"] is not None)
        for run in re.finditer(r"(.)\1*", classes):
            length = run.end() - run.start()
            n_parts = -(-length // LONGEST_RUN)
            first = found.start() + run.start()
            cuts.extend(first + length * number // n_parts for number in range(1, n_parts))
    bounds = [0, *cuts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def _classes(run: str, *, alike: bool) -> str:
    """One letter a character; accents are of the class of what they stand on."""
    if alike:
        return "S" * len(run)
    names = [unicodedata.category(character)[0] for character in run]
    for index, name in enumerate(names):
        if name == "M" and index:
            names[index] = names[index - 1]
        elif name not in "LN":
            names[index] = "S"
    return "".join(names)
