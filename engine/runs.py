"""Cut a text so that no run of like characters is long.

llama.cpp splits the words of most BPE vocabularies with std::regex, which recurses once a character of a
match: some 30,000 letters, spaces, digits or signs in a row end the process. Texts without such runs are not
touched. Knows no tokens.
"""

import itertools
import re
import unicodedata

LONGEST_RUN = 4096  # characters; far more than any word, and an eighth of what a stack of 8 MiB takes

# Looked for at the beginnings of runs only, so that every character is read once.
_LONG = re.compile(rf"(?<!\S)\S{{{LONGEST_RUN + 1},}}|(?<!\s)\s{{{LONGEST_RUN + 1},}}")


def without_long_runs(text: str, *, mixed: bool = False) -> list[str]:
    """The text in parts, at best one; joined they are the text.

    Like characters are letters, digits, white space or others. `mixed`: letters, digits and others are all
    alike, for vocabularies that split at spaces alone.
    """
    cuts: list[int] = []
    for found in _LONG.finditer(text):
        classes = _classes(found.group(), mixed=mixed)
        for run in re.finditer(r"(.)\1*", classes):
            cuts.extend(
                range(found.start() + run.start() + LONGEST_RUN, found.start() + run.end(), LONGEST_RUN)
            )
    bounds = [0, *cuts, len(text)]
    return [text[start:end] for start, end in itertools.pairwise(bounds)]


def _classes(run: str, *, mixed: bool) -> str:
    """One letter a character; accents are of the class of what they stand on."""
    if mixed or run[0].isspace():
        return "S" * len(run)
    names = [unicodedata.category(character)[0] for character in run]
    for index, name in enumerate(names):
        if name == "M" and index:
            names[index] = names[index - 1]
        elif name not in "LN":
            names[index] = "S"
    return "".join(names)
