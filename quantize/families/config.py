"""Read a model's config.json with the defaults that its class has in transformers.

Owns the errors about configuration: each names the key, the value and what to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from quantize.errors import QuantizeError


class UnsupportedConfig(QuantizeError):
    """A configuration that a GGUF cannot express, or that contradicts itself."""

    def __init__(self, key: str, value: Any, problem: str) -> None:
        super().__init__(f"config.json: {key} = {value!r} {problem}")


@dataclass(frozen=True, slots=True)
class Config:
    """config.json's values over the family's defaults; null counts as absent."""

    values: Mapping[str, Any]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands, the family's default, or `default`."""
        value = self.values.get(key)
        if value is None:
            value = self.defaults.get(key)
        return default if value is None else value

    def integer(self, key: str) -> int:
        """A positive integer; required."""
        value = self.get(key)
        if type(value) is not int or value <= 0:
            raise UnsupportedConfig(key, value, "must be a positive integer; download config.json again")
        return value

    def number(self, key: str) -> float:
        """A positive number; required."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UnsupportedConfig(key, value, "must be a positive number; download config.json again")
        return float(value)

    def flag(self, key: str) -> bool:
        """A boolean, false where nothing says."""
        value = self.get(key, False)
        if not isinstance(value, bool):
            raise UnsupportedConfig(key, value, "must be true or false; download config.json again")
        return value

    @property
    def head_dim(self) -> int:
        """Width of one attention head; explicit, or hidden_size over the heads."""
        if self.get("head_dim") is not None:
            return self.integer("head_dim")
        hidden, heads = self.integer("hidden_size"), self.integer("num_attention_heads")
        if hidden % heads:
            raise UnsupportedConfig(
                "hidden_size", hidden, f"is not a multiple of num_attention_heads = {heads}"
            )
        return hidden // heads

    @property
    def n_head_kv(self) -> int:
        """Key-value heads; as many as attention heads where nothing says."""
        name = "num_key_value_heads"
        return self.integer(name if self.get(name) is not None else "num_attention_heads")

    def require(self, key: str, allowed: tuple[Any, ...], why: str) -> None:
        """Refuse any value of `key` that is not in `allowed`."""
        value = self.get(key)
        if value is not None and value not in allowed:
            choice = " or ".join(repr(one) for one in allowed)
            raise UnsupportedConfig(key, value, f"is not supported: {why}; only {choice} can be converted")
