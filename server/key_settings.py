"""[keys.NAME] and [limits] of lq.toml: who may ask, and how much of the server each may use.

A key itself is never in the file, only its digest: the file may be copied and kept under version control.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from engine.request import MAX_SEQUENCES
from server.limits import Policy

DIGEST = re.compile(r"[0-9a-fA-F]{64}")
#: SHA-256 of nothing: what `printf %s "$KEY" | sha256sum` prints when KEY is not set.
DIGEST_OF_NOTHING = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
HOW_TO_MAKE_ONE = 'printf %s "$KEY" | sha256sum'

Unlimited = Literal["unlimited"]
Seconds = Annotated[float, Meta(gt=0, le=86_400)]


class Limits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[limits]: for every key that does not say otherwise, and for everybody where no key is needed.

    None: no limit, or with a key that of [limits]; "unlimited" in a key's table lifts that of [limits].
    """

    max_requests: Annotated[int, Meta(ge=1, le=2**20)] | Unlimited | None = None  # open at once
    max_running: Annotated[int, Meta(ge=1, le=MAX_SEQUENCES)] | Unlimited | None = None  # decoded at once
    tokens_per_minute: Annotated[int, Meta(ge=1, le=2**40)] | Unlimited | None = None  # prompt and answer
    ttft_s: Seconds | Unlimited | None = None  # longest wait for the first token
    total_s: Seconds | Unlimited | None = None  # longest whole request
    isolated_cache: bool | None = None  # cached prefixes are shared within one key only


class Key(Limits, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[keys.NAME]"""

    key_sha256: str  # in hex
    weight: Annotated[float, Meta(ge=0.01, le=1000)] = 1.0  # share of the tokens while there are too few
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0  # more goes first, whatever the weights


def problem(keys: Mapping[str, Key]) -> str | None:
    """What is wrong with the digests, without showing one: somebody may have written the key there."""
    owners: dict[str, str] = {}
    for name, key in keys.items():
        place = f"keys.{name}.key_sha256"
        digest = key.key_sha256.lower()
        if not DIGEST.fullmatch(digest):
            given = f"{len(digest)} characters that are not" if len(digest) != 64 else "something other than"
            return f"{place}: has {given} the 64 hex digits of a SHA-256: write what {HOW_TO_MAKE_ONE} prints"
        if digest == DIGEST_OF_NOTHING:
            return (
                f"{place}: is the digest of an empty key: set KEY, then write what {HOW_TO_MAKE_ONE} prints"
            )
        if digest in owners:
            return f"{place}: is the digest of keys.{owners[digest]} too: give each table a key of its own"
        owners[digest] = name
    return None


def policy(name: str, key: Key | None, limits: Limits) -> Policy:
    """What requests under this name may do: the key's own limits over the general ones."""

    def limit(field: str):
        own = getattr(key, field, None)
        value = getattr(limits, field) if own is None else own
        return None if value == "unlimited" else value

    return Policy(
        name=name,
        weight=key.weight if key else 1.0,
        priority=key.priority if key else 0,
        max_requests=limit("max_requests"),
        max_running=limit("max_running"),
        tokens_per_minute=limit("tokens_per_minute"),
        ttft_s=limit("ttft_s"),
        total_s=limit("total_s"),
        isolated_cache=bool(limit("isolated_cache")),
    )
