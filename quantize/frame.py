"""What a chat template writes around the two turns of a conversation, as token ids.

Owns the cut of the rendered template into before, between and after, and what is said of a model that offers
none. Refuses to know how turns are written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from engine.chat import render_chat
from engine.request import InvalidRequest
from quantize.errors import QuantizeError

QUESTION = "lq-question-stands-here"
ANSWER = "lq-answer-stands-here"
QUESTION_TURN = {"role": "user", "content": QUESTION}
ANSWER_TURN = {"role": "assistant", "content": ANSWER}
#: Templates of models that may think first print an empty thought, or ask for none: a thought would use up
#: the tokens that an answer may have. Other templates do not know the variable.
VARIABLES = {"enable_thinking": False}

#: Text -> token ids, special tokens in the text becoming those tokens, nothing added.
Tokenize = Callable[[str], list[int]]


class CannotConverse(QuantizeError):
    """A model that cannot write texts of its own; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"{reason}, so the model cannot write its own texts; give --calibration FILE (or none) together "
            "with --eval-text FILE"
        )


class UnusableTemplate(CannotConverse):
    """A chat template that does not show both turns as they are."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the chat template cannot frame a conversation: {reason}")


class NothingToBeginFrom(CannotConverse):
    """A base model without a first token."""

    def __init__(self) -> None:
        super().__init__("the model has neither a chat template nor a BOS token to begin from")


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
        before, between, after = map(tokenize, cut(template, bos_token=bos_token, eos_token=eos_token))
        if add_bos is not None and before[:1] != [add_bos]:
            before = [add_bos, *before]
        return cls(tuple(before), tuple(between), tuple(after))


def cut(template: str, *, bos_token: str, eos_token: str) -> tuple[str, str, str]:
    """The template's text before the user's turn, between the turns, and after the answer."""
    render = partial(render_chat, template, bos_token=bos_token, eos_token=eos_token, variables=VARIABLES)
    try:
        alone = render([QUESTION_TURN], add_generation_prompt=False)
        asked = render([QUESTION_TURN])
        answered = render([QUESTION_TURN, ANSWER_TURN], add_generation_prompt=False)
    except InvalidRequest as error:
        raise UnusableTemplate(str(error)) from None
    opening, found, _ = alone.partition(QUESTION)
    if not found:
        raise UnusableTemplate("it does not print the user's message")
    if not asked.startswith(opening + QUESTION):
        raise UnusableTemplate("it changes the text before the user's turn when an answer is asked for")
    if ANSWER not in answered:
        raise UnusableTemplate("it does not print the assistant's message")
    between = asked[len(opening + QUESTION) :]
    return opening, between, answered[answered.rindex(ANSWER) + len(ANSWER) :]


def why_mute(template: str | None, *, bos_token: str | None, eos_token: str | None) -> str | None:
    """Why a model with these cannot write texts of its own; None where nothing speaks against it."""
    try:
        if template:
            cut(template, bos_token=bos_token or "", eos_token=eos_token or "")
        elif bos_token is None:
            raise NothingToBeginFrom
    except CannotConverse as error:
        return error.reason
    return None
