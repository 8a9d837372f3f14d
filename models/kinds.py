"""Recognise what a folder holds (GGUF, checkpoint, embedder, adapter) and check that it is whole.

Decides which files of a model are worth keeping. Executes nothing, opens no pickle.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from models.errors import ModelsError
from models.gguf import Header, read_header
from models.manifest import FILE_NAME, Kind
from models.source import PICKLE_SUFFIXES
from models.tensors import TensorFile

_KEPT_SUFFIXES = frozenset({".safetensors", ".json", ".jinja", ".model", ".md"})
_KEPT_TEXTS = frozenset({"merges.txt", "vocab.txt"})
#: Folders that hold the same weights once more, for another runtime.
_OTHER_RUNTIMES = frozenset(
    {"onnx", "openvino", "original", "coreml", "tflite", "metal", "gguf", "mlx", ".cache", ".git"}
)


class NotAModel(ModelsError):
    """Files that are none of the kinds the store holds, or not all of one."""

    def __init__(self, where: Path | str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")


def is_inside(path: str) -> bool:
    """Whether a relative path that a source names stays inside the folder it is joined to."""
    parts = path.split("/")
    return not any(part in ("", ".", "..") or "\\" in part or ":" in part for part in parts)


def wanted(paths: Iterable[str]) -> list[str]:
    """The files of a checkpoint, embedder or adapter that any part of lq reads, licences included."""
    return sorted(path for path in paths if is_inside(path) and _is_wanted(PurePosixPath(path)))


def _is_wanted(path: PurePosixPath) -> bool:
    if any(part.lower() in _OTHER_RUNTIMES for part in path.parts[:-1]):
        return False
    if path.name == FILE_NAME or path.name.startswith(("consolidated", ".")):
        return False
    licence = path.stem.upper().startswith(("LICENSE", "LICENCE", "NOTICE")) and path.suffix in ("", ".txt")
    return path.suffix in _KEPT_SUFFIXES or path.name in _KEPT_TEXTS or licence


def refuse_pickles(where: str, paths: Iterable[str]) -> None:
    """Raise when the only weights among `paths` are pickles."""
    suffixes = {path: PurePosixPath(path).suffix for path in paths}
    pickles = sorted(path for path, suffix in suffixes.items() if suffix in PICKLE_SUFFIXES)
    if pickles and not {".safetensors", ".gguf"} & set(suffixes.values()):
        raise NotAModel(
            where,
            f"its weights are pickles ({pickles[0]}), which can run code when opened, and are never opened; "
            "use a revision with .safetensors, or convert it where you trust it "
            "(`save_pretrained(..., safe_serialization=True)`)",
        )


def detect(folder: Path) -> Kind:
    """The kind of what lies in `folder`, checked to be whole; raises NotAModel or the format's error."""
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if "adapter_config.json" in paths:
        return _checked_adapter(folder)
    weights = [path for path in wanted(paths) if path.endswith(".safetensors")]
    if "config.json" in paths and weights:
        _check_weights(folder, weights)
        return "embedder" if "modules.json" in paths else "checkpoint"
    if any(folder.glob("*.gguf")):
        return _detect_gguf(sorted(folder.glob("*.gguf")))
    refuse_pickles(str(folder), paths)
    raise NotAModel(
        folder,
        "no model found: expected a .gguf file, or config.json with .safetensors files, or "
        f"adapter_config.json (it holds {', '.join(sorted(paths)[:5]) or 'nothing'})",
    )


def detect_path(path: Path) -> Kind:
    """The kind of a folder, or of a single file, which must be a GGUF."""
    if not path.exists():
        raise NotAModel(path, "no such file or folder; check the path")
    return detect(path) if path.is_dir() else _detect_gguf([path])


def licence(folder: Path) -> str | None:
    """The licence a model states itself: in its GGUF header or its card's front matter."""
    if any(folder.glob("*.gguf")):
        value = read_header(first_gguf(folder)).metadata.get("general.license")
        return value if isinstance(value, str) else None
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    front = text.split("\n---", 1)[0] if text.startswith("---") else ""
    found = re.search(r"^licen[cs]e:\s*([\w.-]+)\s*$", front, re.MULTILINE)
    return found[1] if found else None


def first_gguf(folder: Path) -> Path:
    """The GGUF of an entry; of a split one the first piece, which llama.cpp wants."""
    ggufs = sorted(folder.glob("*.gguf"))
    if not ggufs:
        raise NotAModel(folder, "it holds no .gguf file")
    return ggufs[0]


def _detect_gguf(paths: list[Path]) -> Kind:
    headers = [read_header(path) for path in paths]
    if len(paths) > 1:
        _check_pieces(headers)
    if headers[0].type == "adapter":
        headers[0].require("adapter")
        return "adapter"
    headers[0].require("model")
    return "gguf"


def _check_pieces(headers: list[Header]) -> None:
    count = headers[0].metadata.get("split.count", 0)
    if count != len(headers):
        raise NotAModel(
            headers[0].path.parent,
            f"{len(headers)} .gguf files that are not the pieces of one model (split.count is {count}); "
            "give one file",
        )


def _checked_adapter(folder: Path) -> Kind:
    from models.lora import Adapter

    Adapter.open(folder)
    return "adapter"


def _check_weights(folder: Path, weights: list[str]) -> None:
    """Every weight file complete, every shard of the index present."""
    read_json(folder / "config.json")
    for name in weights:
        TensorFile.open(folder / name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict):
            raise NotAModel(index, "the key weight_map is missing; download the checkpoint again")
        missing = sorted({str(name) for name in shards.values() if not (folder / str(name)).is_file()})
        if missing:
            raise NotAModel(
                folder, f"the shard {missing[0]} is missing ({len(missing)} in all); fetch it again"
            )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise NotAModel(path, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise NotAModel(path, "not a JSON object")
    return value
