"""What clients do in one round: plain values that a scenario builds and load.py carries out."""

from dataclasses import dataclass

Message = dict[str, str]  # {"role": ..., "content": ...}


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a client; the next turn waits for its answer.

    `leave_after_chars`: the client hangs up once it has received so much text. Characters and not chunks,
    since a server may send several tokens in one chunk; the greedy text is the same from both.
    """

    messages: tuple[Message, ...]
    max_tokens: int
    ignore_eos: bool = True
    pause_s: float = 0.0
    leave_after_chars: int | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """Turns asked one after the other from `start_s` on.

    `after` names a group: the clock of `start_s` begins when each of its clients has received text. `until`
    names a group too: this client hangs up when that one has ended. With `history` each turn's messages
    follow the messages and answers of the turns before it.
    """

    start_s: float
    turns: tuple[Turn, ...]
    group: str = "clients"
    after: str | None = None
    until: str | None = None
    history: bool = False
