"""What `lq quantize` is given: a store name, a hub reference, a checkpoint folder or a GGUF.

Finds it, names it, says whether it is full precision, and hashes it. Makes nothing.
"""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from models.gguf import Header, read_header
from models.kinds import detect_path, first_gguf, licence
from models.reference import HubReference, parse
from models.store import NameTaken, Store
from quantize.errors import QuantizeError

FULL = frozenset({"F32", "F16", "BF16"})
TYPE_SUFFIX = re.compile(r"[-._](F32|F16|BF16|FP16|FP32|I?Q\d\w*|TQ\d_\d|MXFP4\w*)$", re.IGNORECASE)
#: What converting reads of a checkpoint's or an adapter's folder, beside its *.safetensors.
READ = frozenset(
    {"config.json", "generation_config.json", "model.safetensors.index.json", "README.md"}
    | {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"}
    | {"added_tokens.json", "chat_template.jinja", "chat_template.json", "adapter_config.json"}
)
Progress = Callable[[str, int, int | None], None]


class UnusableSource(QuantizeError):
    """A source that cannot be quantized, and what to give instead."""

    def __init__(self, given: str, reason: str) -> None:
        super().__init__(f"{given}: {reason}")


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder or one GGUF file. `given` is what the user wrote."""

    given: str
    kind: Literal["checkpoint", "gguf"]
    path: Path
    name: str
    licence: str | None = None
    base_model: str | None = None

    def file_name(self, kind: str) -> str:
        """The file of one type."""
        return f"{self.name}-{kind}.gguf"

    def store_name(self, kind: str) -> str:
        """The name of that file in the store."""
        return f"{self.name}-{kind}".lower()


def unseen(text: str) -> Source:
    """SOURCE as it is written, before it is looked for: enough to check the options beside it."""
    return Source(text, "checkpoint", Path(text), text)


def find(text: str, *, store: Store, progress: Progress | None = None) -> Source:
    """Resolve SOURCE; an `hf:` or `pypi:` reference is pulled into the store first."""
    if text.startswith(("hf:", "pypi:")):
        return _stored(text, _pulled(text, store, progress), store)
    path = Path(text).expanduser()
    if not path.exists() and "/" not in text:
        return _stored(text, store.get(text).name, store)
    return _of_kind(text, path.absolute(), detect_path(path))


def _pulled(text: str, store: Store, progress: Progress | None) -> str:
    """The name under which a reference is in the store now."""
    try:
        return store.pull(text, progress=progress).name
    except NameTaken as error:
        raise UnusableSource(
            text,
            f"the store holds {error.name!r} already, from {error.source}; `lq pull {text} --name N` stores "
            "this one under a name of its own, then give that as SOURCE",
        ) from None


def _stored(given: str, name: str, store: Store) -> Source:
    entry = store.get(name)
    found = _of_kind(given, entry.path, entry.kind, name=name)
    origin = entry.manifest.source
    reference = parse(origin) if origin.startswith("hf:") else None
    base = reference.repo if isinstance(reference, HubReference) else None
    return Source(given, found.kind, found.path, found.name, entry.manifest.licence or found.licence, base)


def _of_kind(given: str, path: Path, kind: str, *, name: str | None = None) -> Source:
    if kind == "checkpoint":
        return Source(given, "checkpoint", path, name or path.name, licence(path))
    if kind == "gguf":
        file = path if path.is_file() else first_gguf(path)
        header = read_header(file).require("model")
        if int(header.metadata.get("split.count", 0)) > 1:
            raise UnusableSource(
                given, "a GGUF in several pieces; merge it first with llama.cpp's `llama-gguf-split --merge`"
            )
        stem = TYPE_SUFFIX.sub("", name or file.stem)
        stated = header.metadata.get("general.license")
        return Source(given, "gguf", file, stem, stated if isinstance(stated, str) else None)
    raise UnusableSource(given, f"this is an {kind}; give a checkpoint folder or a GGUF model")


def is_full_precision(header: Header) -> bool:
    """Whether every tensor is still F32, F16 or BF16."""
    return all(tensor.type.name in FULL for tensor in header.tensors)


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of what converting reads of a folder."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for file in sorted(path.iterdir()):
        if file.is_file() and (file.name in READ or file.suffix == ".safetensors"):
            total.update(f"{file.name}\0{digest(file)}\n".encode())
    for file in sorted((path / "additional_chat_templates").glob("*.jinja")):
        total.update(f"{file.parent.name}/{file.name}\0{digest(file)}\n".encode())
    return total.hexdigest()


def named(source: Source, name: str | None) -> Source:
    """The source under another name, which becomes part of file names."""
    if name is None:
        return source
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise UnusableSource(
            source.given, f"--name {name!r} is not a file name of letters, digits, . _ and -"
        )
    return replace(source, name=name)
