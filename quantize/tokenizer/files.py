"""Gather what a checkpoint folder says about its tokenizer, from the many files that may say it.

Owns precedence between tokenizer.json, tokenizer_config.json, special_tokens_map.json, added_tokens.json
and the chat template files; refuses to know how text becomes tokens.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.checkpoint import InvalidCheckpoint, read_json
from quantize.errors import QuantizeError

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class MissingTokenizer(QuantizeError):
    """A folder without a tokenizer that can be read."""

    def __init__(self, path: Path) -> None:
        alone = ("vocab.json", "tekken.json", "tokenizer.model.v3", "vocab.txt")
        others = [name for name in alone if (path / name).is_file()]
        found = f" ({', '.join(others)} cannot be read alone)" if others else ""
        super().__init__(
            f"{path}: holds neither tokenizer.json nor tokenizer.model{found}; "
            "save it there: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token beside the learnt vocabulary, matched in text before anything else."""

    id: int
    text: str
    special: bool
    strips: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed files of one folder."""

    path: Path
    spec: Mapping[str, Any] | None
    config: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "TokenizerFiles":
        """Read the files; raises MissingTokenizer where none describes a tokenizer."""
        spec = read_json(path / "tokenizer.json")
        if spec is None and not (path / "tokenizer.model").is_file():
            raise MissingTokenizer(path)
        if spec is not None and not isinstance(spec.get("model"), dict):
            raise MissingTokenizer(path)
        named = read_json(path / "special_tokens_map.json") or {}
        return cls(path, spec, named | (read_json(path / "tokenizer_config.json") or {}))

    @cached_property
    def added(self) -> dict[int, AddedToken]:
        """Added tokens by id; tokenizer.json has the last word."""
        tokens: dict[int, AddedToken] = {}
        for token in self._added():
            tokens[token.id] = token
        named = self.special_texts
        return {
            token.id: AddedToken(token.id, token.text, token.special or token.text in named, token.strips)
            for token in tokens.values()
        }

    def _added(self) -> Iterator[AddedToken]:
        for text, token_id in (read_json(self.path / "added_tokens.json") or {}).items():
            yield self._added_token("added_tokens.json", token_id, {"content": text})
        for token_id, entry in (self.config.get("added_tokens_decoder") or {}).items():
            yield self._added_token("tokenizer_config.json", token_id, entry)
        for entry in (self.spec or {}).get("added_tokens") or []:
            yield self._added_token("tokenizer.json", entry.get("id"), entry)

    def _added_token(self, file: str, token_id: Any, entry: Any) -> AddedToken:
        text = _content(entry)
        if text is None or not str(token_id).isdecimal():
            problem = f"has an added token without text or number: {token_id!r}: {entry!r}"
            raise InvalidCheckpoint(self.path / file, problem, "download it again")
        entry = entry if isinstance(entry, dict) else {}
        strips = bool(entry.get("rstrip") or entry.get("lstrip"))
        return AddedToken(int(token_id), text, bool(entry.get("special")), strips)

    @cached_property
    def special_texts(self) -> frozenset[str]:
        """Texts that the configuration names as special."""
        extra = self.config.get("extra_special_tokens")
        texts = [self.text_of(role) for role in ROLES]
        texts += list(extra.values()) if isinstance(extra, dict) else list(extra or [])
        texts += self.config.get("additional_special_tokens") or []
        return frozenset(content for text in texts if (content := _content(text)))

    def text_of(self, role: str) -> str | None:
        """The token that plays a role: bos, eos, …"""
        return _content(self.config.get(f"{role}_token"))

    @property
    def chat_template(self) -> str | list[dict[str, str]] | None:
        """One template, or several by name; a template file goes before the configuration's."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            template = file.read_text("utf-8")
            more = sorted((self.path / "additional_chat_templates").glob("*.jinja"))
            named = [{"name": one.stem, "template": one.read_text("utf-8")} for one in more]
            return [{"name": "default", "template": template}, *named] if named else template
        template = (read_json(self.path / "chat_template.json") or self.config).get("chat_template")
        return template if isinstance(template, str | list) else None


def _content(token: Any) -> str | None:
    """The text of a token that is written as a string or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
