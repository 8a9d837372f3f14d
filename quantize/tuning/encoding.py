"""Turn chats into tokens, and say which of them the assistant wrote.

The chat template is rendered as the server renders it, so that a model learns exactly what it is asked for
later: to go on where the prompt of a turn ends, and to end the turn. Owns the cut; knows no network.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from engine.chat import render_chat
from engine.request import InvalidRequest
from quantize.errors import QuantizeError
from quantize.tokenizer.files import TokenizerFiles
from quantize.tokenizer.vocabulary import Vocabulary
from quantize.tuning.chats import BadChat, Chat


class CannotEncode(QuantizeError):
    """A model whose tokenizer or template cannot make tokens of chats."""

    def __init__(self, checkpoint: Path, problem: str, remedy: str) -> None:
        super().__init__(f"{checkpoint}: {problem}; {remedy}")


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence to learn from. `wanted[i]`: token i was written by the assistant and counts for the loss.

    `chat` is the index of the chat it was made of; one chat can become several sequences.
    """

    chat: int
    tokens: np.ndarray  # int32
    wanted: np.ndarray  # bool

    @property
    def n_wanted(self) -> int:
        """Tokens that count; the first of a sequence has nothing that predicts it."""
        return int(self.wanted[1:].sum())

    def cut(self, length: int) -> "Example":
        """Its first tokens."""
        return Example(self.chat, self.tokens[:length], self.wanted[:length])


@dataclass(frozen=True)
class Encoder:
    """A model's template and tokenizer."""

    checkpoint: Path
    template: str
    tokenizer: Tokenizer
    bos_token: str
    eos_token: str
    first: int | None  # put before a text that does not begin with it; None: nothing is
    controls: tuple[str, ...]

    @classmethod
    def of(cls, checkpoint: Path, vocabulary: Vocabulary) -> "Encoder":
        """From a checkpoint's folder and its vocabulary; raises CannotEncode."""
        template = vocabulary.default_template
        if not template:
            raise CannotEncode(
                checkpoint,
                "has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json)",
                "put the template of its instruct version there as chat_template.jinja",
            )
        path = checkpoint / "tokenizer.json"
        if not path.is_file():
            raise CannotEncode(
                checkpoint,
                "has no tokenizer.json",
                "save it there: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
            )
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        added = TokenizerFiles.open(checkpoint).added.values()
        return cls(
            checkpoint=checkpoint,
            template=template,
            tokenizer=tokenizer,
            bos_token=vocabulary.text_of("bos") or "",
            eos_token=vocabulary.text_of("eos") or "",
            first=vocabulary.special.ids.get("bos") if vocabulary.special.adds_bos else None,
            controls=tuple(sorted((token.text for token in added if token.special), key=len, reverse=True)),
        )

    @cached_property
    def control(self) -> re.Pattern[str] | None:
        """Matches the text of any control token."""
        return re.compile("|".join(map(re.escape, self.controls))) if self.controls else None

    def examples(self, path: Path, index: int, chat: Chat) -> list[Example]:
        """The sequences of one chat: one, or one a turn where the template rewrites earlier turns.

        `path` is for errors. Raises BadChat.
        """
        self._refuse_controls(path, chat)
        turns = [i for i, message in enumerate(chat.messages) if message.learnt]
        try:
            whole = self._render(chat.turns[: turns[-1] + 1], prompt=False)
            spans = [self._span(chat, turn, whole) for turn in turns]
            if all(span is not None for span in spans):
                return [self._example(index, whole, [span for span in spans if span])]
            return [self._alone(path, index, chat, turn) for turn in turns]
        except InvalidRequest as error:
            remedy = "change the chat to what the template takes, or the template"
            raise BadChat(path, chat.line, str(error), remedy) from None

    def _alone(self, path: Path, index: int, chat: Chat, turn: int) -> Example:
        """One turn as it is asked for in a server: all before it is prompt."""
        whole = self._render(chat.turns[: turn + 1], prompt=False)
        span = self._span(chat, turn, whole)
        if span is None:
            problem = f"the chat template prints messages[{turn}] otherwise than its prompt announces"
            raise BadChat(
                path, chat.line, problem, "give the model a template whose answers follow the prompt"
            )
        return self._example(index, whole, [span])

    def _span(self, chat: Chat, turn: int, whole: str) -> tuple[int, int] | None:
        """Where `whole` holds what the model itself has to write for a turn, the token that ends it included.

        None where `whole` does not begin with that turn's prompt, or prints the turn differently later.
        """
        prompt = self._render(chat.turns[:turn], prompt=True)
        answered = self._render(chat.turns[: turn + 1], prompt=False)
        if not answered.startswith(prompt):
            return None
        content = chat.messages[turn].content.strip()
        at = answered.find(content, len(prompt))
        after = at + len(content) if at >= 0 else len(prompt)
        found = self.control.search(answered, after) if self.control else None
        end = found.end() if found else len(answered)
        return (len(prompt), end) if whole.startswith(answered[:end]) else None

    def _example(self, index: int, text: str, spans: list[tuple[int, int]]) -> Example:
        text = text[: spans[-1][1]]  # nothing is learnt from what follows
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        starts, ends = np.array(encoded.offsets, np.int64).reshape(-1, 2).T
        wanted = np.zeros(len(encoded.ids), bool)
        for start, end in spans:
            # A token over the border belongs to the prompt's side: in a server the two never meet in one.
            wanted |= (starts >= start) & (ends <= end)
        tokens = np.array(encoded.ids, np.int32)
        if self.first is not None and tokens[:1].tolist() != [self.first]:
            tokens, wanted = np.insert(tokens, 0, self.first), np.insert(wanted, 0, False)
        return Example(index, tokens, wanted)

    def _render(self, turns: list[dict[str, str]], *, prompt: bool) -> str:
        return render_chat(
            self.template,
            turns,
            bos_token=self.bos_token,
            eos_token=self.eos_token,
            add_generation_prompt=prompt,
        )

    def _refuse_controls(self, path: Path, chat: Chat) -> None:
        """A control token written in a message would end a turn here; a server takes it for plain text."""
        for number, message in enumerate(chat.messages):
            if self.control and (found := self.control.search(message.content)):
                problem = f"messages[{number}].content holds {found[0]!r}, a control token of the model"
                raise BadChat(path, chat.line, problem, "take it out: the chat template puts them in")


@dataclass(frozen=True, slots=True)
class Encoded:
    """All sequences of a file and what was done to them; `facts` are for the report."""

    examples: tuple[Example, ...]
    facts: Mapping[str, Any]


def encode(encoder: Encoder, chats: list[Chat], path: Path, *, max_length: int) -> Encoded:
    """Encode every chat. What is longer than `max_length` tokens is cut at its end, and left out where
    nothing of the assistant remains; raises CannotEncode where that leaves nothing."""
    examples = list(_all(encoder, chats, path))
    longest = max(len(example.tokens) for example in examples)
    kept = [example.cut(max_length) for example in examples]
    kept = [example for example in kept if example.n_wanted]
    if not kept:
        raise CannotEncode(
            path,
            f"no chat has a token of the assistant within --max-length {max_length} "
            f"(the longest has {longest})",
            "raise --max-length or shorten the chats",
        )
    return Encoded(tuple(kept), facts_of(len(chats), examples, kept, max_length))


def _all(encoder: Encoder, chats: list[Chat], path: Path) -> Iterator[Example]:
    for index, chat in enumerate(chats):
        yield from encoder.examples(path, index, chat)


def facts_of(
    n_chats: int, examples: Sequence[Example], kept: Sequence[Example], max_length: int
) -> dict[str, int]:
    """What is told of sequences, as they were made and as they were kept."""
    return {
        "n_chats": n_chats,
        "n_sequences": len(kept),
        "n_tokens": sum(len(example.tokens) for example in kept),
        "n_learnt": sum(example.n_wanted for example in kept),
        "longest": max(len(example.tokens) for example in examples),
        "n_cut": sum(len(example.tokens) > max_length for example in examples),
        "n_left_out": len(examples) - len(kept),
    }
