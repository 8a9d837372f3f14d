"""Who may ask: API keys, compared in constant time, and the names under which the server may be addressed."""

import hashlib
import hmac
import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from server.errors import HostNotAllowed, Unauthorized
from server.settings import Settings, SettingsError

ENVIRONMENT = "LQ_API_KEY"
MIN_KEY_CHARACTERS = 8
HOST_NAME = re.compile(r"\[[0-9a-f:.]+\]|[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_.])?")
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})


@dataclass(frozen=True, slots=True)
class Accepted:
    """A key that opens the server, and the name under which its requests are counted and limited."""

    name: str
    digest: bytes


class Keys:
    """The accepted API keys; none means that everybody may ask, under the name ""."""

    def __init__(self, accepted: Iterable[Accepted] = ()) -> None:
        self._accepted = tuple(accepted)

    @property
    def required(self) -> bool:
        return bool(self._accepted)

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that `check` returns."""
        return tuple(each.name for each in self._accepted) or ("",)

    def check(self, authorization: str | None) -> str:
        """The name of the key in the Authorization header; Unauthorized when it is none of ours."""
        if not self.required:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _digest(key.strip()) if scheme.lower() == "bearer" else _digest("")
        # Digests have one length, and all are compared: the time taken tells nothing about the keys.
        matches = [each.name for each in self._accepted if hmac.compare_digest(given, each.digest)]
        if not matches:
            raise Unauthorized(given=bool(key))
        return matches[0]


def read_keys(settings: Settings) -> Keys:
    """Keys of [keys.NAME], of the file (one a line, `#` comments) and of the environment.

    A key of the last two is named by where it stands; when it is one of [keys.NAME], it is that one.
    Refuses an open door without a key.
    """
    accepted = [Accepted(name, bytes.fromhex(key.key_sha256)) for name, key in settings.keys.items()]
    for name, text in [*_from_file(settings.server.api_key_file), *_from_environment()]:
        key = accept(name, text)
        if key.digest in {each.digest for each in accepted}:
            continue
        if name in settings.keys:
            problem = "is the name that another key has, by where it stands: choose another for the table"
            raise SettingsError(f"keys.{name}: {problem}")
        accepted.append(key)
    if not accepted and not settings.is_loopback:
        raise SettingsError(
            f"{settings.server.host} can be reached from other machines, so an API key is needed: "
            f"set {ENVIRONMENT} or --api-key-file, name keys in lq.toml, or serve on 127.0.0.1"
        )
    return Keys(accepted)


def accept(name: str, key: str) -> Accepted:
    """The key under this name; SettingsError, which does not show it, for one that cannot be used."""
    if len(key) < MIN_KEY_CHARACTERS:
        raise SettingsError(f"an API key has {len(key)} characters; use {MIN_KEY_CHARACTERS} or more")
    if not (key.isascii() and key.isprintable()):
        raise SettingsError(
            "an API key has a character that no HTTP header carries: use ASCII letters, digits and signs"
        )
    return Accepted(name, _digest(key))


def _from_file(path: str | None) -> list[tuple[str, str]]:
    """(name, key) by line."""
    if path is None:
        return []
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise SettingsError(f"API key file {path}: {reason}") from None
    keys = [
        (f"api_key_file:{number}", line)
        for number, line in enumerate(lines, start=1)
        if line and not line.startswith("#")
    ]
    if not keys:
        raise SettingsError(f"API key file {path}: holds no key; write one a line")
    return keys


def _from_environment() -> list[tuple[str, str]]:
    key = os.environ.get(ENVIRONMENT, "").strip()
    return [(ENVIRONMENT, key)] if key else []


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(text: str) -> str:
    """An entry of `allowed_hosts` as the Host header carries it."""
    name = _bracketed(text.strip().lower())
    if not HOST_NAME.fullmatch(name):
        raise SettingsError(
            f"server.allowed_hosts: {text[:200]!r} is no host name: leave out scheme, port and path "
            "(every port is allowed), such as lq.example.org"
        )
    return name


def _bracketed(name: str) -> str:
    """An IPv6 address in the brackets that it has in a Host header; other names as they are."""
    try:
        return f"[{ipaddress.IPv6Address(name)}]"
    except ValueError:
        return name


class Hosts:
    """Names that the Host header may carry: on loopback, no page of another name (DNS rebinding)."""

    def __init__(self, settings: Settings) -> None:
        extra = {_host_name(name) for name in settings.server.allowed_hosts}
        own = {_bracketed(settings.server.host.lower())} | LOOPBACK_HOSTS
        self._allowed = own | extra if settings.is_loopback or extra else None

    def check(self, header: str | None) -> None:
        """Raise HostNotAllowed for a name that is not ours; the port does not matter."""
        if self._allowed is None:
            return
        host = (header or "").strip().lower()
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if name not in self._allowed:
            raise HostNotAllowed(header or "")
