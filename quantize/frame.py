"""What a chat template writes around the two turns of a conversation, as token ids.

Owns the cut of the rendered template into before, between and after. Refuses to know how turns are written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.chat import open_user_turn, render_chat
from quantize.errors import QuantizeError

QUESTION = "lq-question-stands-here"
ANSWER = "lq-answer-stands-here"
QUESTION_TURN = {"role": "user", "content": QUESTION}
ANSWER_TURN = {"role": "assistant", "content": ANSWER}

#: Text -> token ids, special tokens in the text becoming those tokens, nothing added.
Tokenize = Callable[[str], list[int]]


class UnusableTemplate(QuantizeError):
    """A chat template that does not show both turns as they are."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the chat template cannot frame a conversation: {reason}; use --calibration FILE")


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids before the user's turn, between the turns, and after the answer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(
        cls, template: str, tokenize: Tokenize, *, bos_token: str, eos_token: str, add_bos: int | None
    ) -> "Frame":
        """Cut `template`; `add_bos` is put first where the model wants it and the template lacks it."""
        opening = open_user_turn(template, bos_token=bos_token, eos_token=eos_token)
        render = partial(render_chat, template, bos_token=bos_token, eos_token=eos_token)
        asked = render([QUESTION_TURN])
        answered = render([QUESTION_TURN, ANSWER_TURN], add_generation_prompt=False)
        if not asked.startswith(opening + QUESTION):
            raise UnusableTemplate("it changes the text before the user's turn when an answer is asked for")
        if ANSWER not in answered:
            raise UnusableTemplate("it does not print the assistant's message")
        before = tokenize(opening)
        if add_bos is not None and before[:1] != [add_bos]:
            before = [add_bos, *before]
        between = tokenize(asked[len(opening + QUESTION) :])
        after = tokenize(answered[answered.rindex(ANSWER) + len(ANSWER) :])
        return cls(tuple(before), tuple(between), tuple(after))
