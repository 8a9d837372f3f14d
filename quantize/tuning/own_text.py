"""Conversations that a model wrote itself, as `lq quantize` leaves them in OUT/work: what to distill on.

Their tokens are the model's own, so no template and no tokenizer is asked. All of it is learnt but what the
template put there.
"""

import json
from pathlib import Path

import numpy as np

from quantize.calibration.conversation import Conversation, read
from quantize.tuning.encoding import CannotEncode, Encoded, Example, facts_of


def is_own_text(path: Path) -> bool:
    """Whether a file begins as the journals of `lq quantize` do, with its key."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(1000)
    try:
        value = json.loads(first)
    except ValueError:
        return False
    return isinstance(value, dict) and value.keys() == {"key"}


def read_own_text(path: Path) -> list[Conversation]:
    """All conversations of a journal."""
    found = read(path)
    if not found:
        raise CannotEncode(path, "holds no conversation", "give another file")
    return found


def encode_own_text(
    conversations: list[Conversation], path: Path, *, n_vocab: int, max_length: int
) -> Encoded:
    """Their first `max_length` tokens; raises CannotEncode for those of another model."""
    strange = [c.number for c in conversations if max(c.tokens, default=0) >= n_vocab]
    if strange:
        raise CannotEncode(
            path,
            f"conversation {strange[0]} has tokens beyond the model's {n_vocab}",
            "give what this model wrote",
        )
    examples = [_example(index, conversation) for index, conversation in enumerate(conversations)]
    kept = [example.cut(max_length) for example in examples]
    kept = [example for example in kept if example.n_wanted]
    if not kept:
        raise CannotEncode(path, f"nothing to learn within --max-length {max_length}", "raise it")
    return Encoded(tuple(kept), facts_of(len(conversations), examples, kept, max_length))


def _example(index: int, conversation: Conversation) -> Example:
    wanted = np.ones(len(conversation.tokens), bool)
    wanted[list(conversation.positions("template"))] = False
    return Example(index, np.array(conversation.tokens, np.int32), wanted)
