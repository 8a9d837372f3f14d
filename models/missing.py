"""What is raised when a name is not, or holds not, what was asked for, with the nearest that does.

Knows the catalogue, to say what could be pulled; never touches the disk.
"""

import difflib

from models.catalog import catalog
from models.errors import ModelsError


class UnknownModel(ModelsError):
    """A name that neither the store nor the file system knows."""

    def __init__(self, name: str, known: list[str]) -> None:
        here = difflib.get_close_matches(name, known, n=2)
        offers = difflib.get_close_matches(name, list(catalog()), n=1)
        if name in catalog():
            remedy = f"`lq pull {name}` fetches it"
        elif here:
            remedy = f"did you mean {' or '.join(here)}? `lq list` shows what is here"
        elif offers:
            remedy = f"`lq pull {offers[0]}` would fetch the closest of the catalogue"
        else:
            remedy = "`lq list` shows what is here, `lq list --catalog` what can be pulled"
        super().__init__(f"no model named {name!r} in the store; {remedy}")


class NameTaken(ModelsError):
    """The name holds something else already."""

    def __init__(self, name: str, source: str) -> None:
        self.name, self.source = name, source
        super().__init__(
            f"the store already holds {name!r}, from {source}; give another name with --name, "
            f"or remove it first with `lq rm {name}`"
        )


class ContentChanged(ModelsError):
    """The path that an entry was copied from holds something else by now."""

    def __init__(self, name: str, source: str) -> None:
        super().__init__(
            f"{source.removeprefix('file:')} has changed since it was stored as {name!r}, which is still the "
            f"old content; remove that first with `lq rm {name}`, or give another name with --name"
        )


class WrongKind(ModelsError):
    """An entry or path of another kind than asked for."""

    def __init__(self, what: str, found: str, wanted: str, remedy: str) -> None:
        super().__init__(f"{what} is of kind {found}, a {wanted} is needed; {remedy}")
