"""Bytes of tokens become text: whole UTF-8 characters only, and never a stop string or the start of one.

State machines: `step` takes more input and gives what can be shown. They know no tokens.
"""

import codecs


class Decoder:
    """Incremental UTF-8: half a character waits for its other half, and is dropped when that never comes."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, data: bytes) -> str:
        """The whole characters that are there now; bytes that are no UTF-8 become U+FFFD."""
        return self._decoder.decode(data)


class StopStrings:
    """Holds back text that may become a stop string; `found` is the one that ended the text."""

    def __init__(self, strings: tuple[str, ...]) -> None:
        self._strings = strings
        self._held = ""
        self._longest = max((len(string) for string in strings), default=0)
        self.found: str | None = None

    def step(self, text: str) -> str:
        """What can be shown now. After `found` is set nothing more comes."""
        if not self._strings:
            return text
        if self.found is not None:
            return ""
        self._held += text
        first = min(
            ((at, string) for string in self._strings if (at := self._held.find(string)) >= 0),
            default=None,
            key=lambda hit: (hit[0], -len(hit[1])),
        )
        if first is not None:
            at, self.found = first
            shown, self._held = self._held[:at], ""
            return shown
        keep = self._possible_start()
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """What was held back in vain."""
        shown, self._held = self._held, ""
        return "" if self.found is not None else shown

    def _possible_start(self) -> int:
        """Characters at the end that begin some stop string, at most its length less one."""
        for length in range(min(self._longest - 1, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(string.startswith(tail) for string in self._strings):
                return length
        return 0
