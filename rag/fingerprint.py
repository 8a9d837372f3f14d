"""What makes two embedders the same: a hash of weights, tokenizer and settings, not of folder or library.

Reads files only; loads no model.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

#: Files beside the weights that decide a vector. Notes, licences and other runtimes' copies do not.
_DECIDING = (
    "modules.json",
    "config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "sentencepiece.bpe.model",
    "spiece.model",
)
#: Keys that name versions and origins.
_INCIDENTAL = frozenset(
    {"__version__", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash"}
)
_OTHER_RUNTIMES = frozenset({"onnx", "openvino", "tflite"})
_BLOCK_BYTES = 1 << 20


def of_folder(folder: Path) -> str:
    """16 hexadecimal digits; equal for equal weights, tokenizer, pooling and prefixes."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(_settings(path) if path.suffix == ".json" else _hash(path))
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts[:-1]
        if _OTHER_RUNTIMES.intersection(inner) or not path.is_file():
            continue
        if path.suffix == ".safetensors" or path.name in _DECIDING:
            yield path


def _settings(path: Path) -> bytes:
    """Canonical JSON without the keys that libraries add about themselves."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        return _hash(path)
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if key not in _INCIDENTAL}
    return json.dumps(value, sort_keys=True).encode()


def _hash(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.digest()
