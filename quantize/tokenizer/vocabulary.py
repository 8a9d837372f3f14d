"""A checkpoint's tokenizer as a GGUF vocabulary: tokens with types, and scores or merges.

Two kinds: byte-level BPE ("gpt2") with its merges, and SentencePiece's BPE with byte fallback ("llama") with
scores; where only tokenizer.json exists, the scores follow from the order of its merges.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from quantize.checkpoint import read_json
from quantize.tokenizer import pieces
from quantize.tokenizer.files import TokenizerFiles
from quantize.tokenizer.pieces import UnsupportedTokenizer
from quantize.tokenizer.pretokenizer import identify
from quantize.tokenizer.sentencepiece_model import Piece, read_sentencepiece
from quantize.tokenizer.special_tokens import SpecialTokens, read_special_tokens


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Everything under `tokenizer.` in a GGUF, and what the user should know of it."""

    model: str
    pre: str
    pieces: Sequence[Piece]
    merges: Sequence[str]
    special: SpecialTokens
    adds_space_prefix: bool | None
    chat_template: str | list[dict[str, str]] | None
    #: added tokens swallow the spaces around them, which llama.cpp does for models named Phi-3 only
    strips: bool
    notes: tuple[str, ...]

    def text_of(self, role: str) -> str | None:
        """The special token that plays a role: bos, eos, …"""
        return self.pieces[self.special.ids[role]].text if role in self.special.ids else None

    @property
    def default_template(self) -> str | None:
        """The chat template that is used where none is named."""
        if self.chat_template is None or isinstance(self.chat_template, str):
            return self.chat_template
        return next((t.get("template") for t in self.chat_template if t.get("name") == "default"), None)

    def write(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys to a GGUF."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list([piece.text for piece in self.pieces])
        if self.model == "llama":
            writer.add_token_scores([piece.score for piece in self.pieces])
        writer.add_token_types([int(piece.type) for piece in self.pieces])
        if self.merges:
            writer.add_token_merges(self.merges)
        for role, token_id in self.special.ids.items():
            getattr(writer, f"add_{role}_token_id")(token_id)
        writer.add_add_bos_token(self.special.adds_bos)
        writer.add_add_eos_token(self.special.adds_eos)
        if self.adds_space_prefix is not None:
            writer.add_add_space_prefix(self.adds_space_prefix)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


@dataclass(frozen=True, slots=True)
class _Learnt:
    """What the tokenizer learnt, before added tokens."""

    model: str
    pre: str
    pieces: dict[int, Piece]
    merges: Sequence[str]
    adds_space_prefix: bool | None
    notes: tuple[str, ...] = ()


def read_vocabulary(
    path: Path,
    *,
    n_vocab: int,
    config: Mapping[str, Any],
    pre: str | None = None,
    foreign: frozenset[str] = frozenset(),
) -> Vocabulary:
    """The vocabulary of the checkpoint in `path`, padded to the embedding's `n_vocab` rows.

    `config` is config.json (its text part); `pre` overrides the splitting rule of a byte-level tokenizer;
    `foreign` are added tokens that may lie beyond the embedding.
    """
    files = TokenizerFiles.open(path)
    tokenizer = _load(path) if files.spec is not None else None
    learnt = _learn(files, tokenizer, pre)
    pieces.overlay(learnt.pieces, files.added.values())
    beyond = [text for text in pieces.drop_beyond(learnt.pieces, n_vocab) if text not in foreign]
    full = pieces.fill(learnt.pieces, n_vocab)
    special = read_special_tokens(
        files,
        {piece.text: token_id for token_id, piece in enumerate(full)},
        config=config,
        generation=read_json(path / "generation_config.json") or {},
        tokenizer=tokenizer,
    )
    return Vocabulary(
        model=learnt.model,
        pre=learnt.pre,
        pieces=full,
        merges=learnt.merges,
        special=special,
        adds_space_prefix=learnt.adds_space_prefix,
        chat_template=files.chat_template,
        strips=any(token.strips for token in files.added.values()),
        notes=learnt.notes + _beyond_note(beyond, n_vocab),
    )


def _load(path: Path) -> Tokenizer:
    try:
        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise UnsupportedTokenizer(f"cannot be loaded ({error})") from None
    tokenizer.no_padding()  # these two are saved from training, and are about batches
    tokenizer.no_truncation()
    return tokenizer


def _learn(files: TokenizerFiles, tokenizer: Tokenizer | None, pre: str | None) -> _Learnt:
    if files.spec is None or tokenizer is None or pieces.kind_of(files.spec) == "llama":
        return _learn_sentencepiece(files)
    rule = identify(tokenizer, files.spec, pre=pre)
    learnt, merges = pieces.byte_level(files.spec), pieces.merges(files.spec)
    return _Learnt("gpt2", rule, learnt, merges, None, _normalizer_note(files.spec))


def _learn_sentencepiece(files: TokenizerFiles) -> _Learnt:
    """Scores from tokenizer.model where there is one, else from tokenizer.json's merges."""
    file, explicit = files.path / "tokenizer.model", files.config.get("add_prefix_space")
    if not file.is_file():
        assert files.spec is not None, "TokenizerFiles.open refuses a folder with neither"
        prefix = pieces.prepends_space(files.spec)
        notes = _normalizer_note(files.spec) + _prefix_note(files.spec)
        return _Learnt("llama", "default", pieces.scored(files.spec), [], prefix, notes)
    model = read_sentencepiece(file)
    prefix = pieces.prepends_space(files.spec) if files.spec is not None else model.adds_space_prefix
    if files.spec is None and isinstance(explicit, bool):
        prefix = explicit
    note = "tokenizer.model normalizes unusual characters (full-width ones, for example), llama.cpp does not."
    spec = files.spec or {}
    notes = ((note,) if model.normalizes else _normalizer_note(spec)) + _prefix_note(spec)
    return _Learnt("llama", "default", dict(enumerate(model.pieces)), [], prefix, notes)


def _normalizer_note(spec: Mapping[str, Any]) -> tuple[str, ...]:
    names = pieces.normalizers(spec)
    if not names:
        return ()
    return (
        f"The tokenizer normalizes texts ({', '.join(names)}), llama.cpp does not: what that would change, "
        "such as an accent written as a character of its own, becomes other tokens than in the checkpoint.",
    )


def _prefix_note(spec: Mapping[str, Any]) -> tuple[str, ...]:
    if not pieces.prepends_space_once(spec):
        return ()
    return (
        "The tokenizer puts a space before the first word of a text only; llama.cpp puts one after every "
        "special token too, so that the words after them may become other tokens than in the checkpoint.",
    )


def _beyond_note(texts: Sequence[str], n_vocab: int) -> tuple[str, ...]:
    if not texts:
        return ()
    some = ", ".join(repr(text) for text in texts[:5])
    return (f"{len(texts)} tokens have no row among the embedding's {n_vocab} and are left out: {some}.",)
