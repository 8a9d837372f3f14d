"""What `lq show` tells of a model: facts read from headers, never from names.

Returns plain values with units in their keys; laying them out is the caller's business.
"""

from pathlib import Path
from typing import Any

from models import kinds
from models.gguf import Header, read_header
from models.lora import Adapter
from models.store import Entry
from models.tensors import TensorFile


def of_entry(entry: Entry) -> dict[str, Any]:
    """Facts of a store entry: its manifest first, then its format's own."""
    manifest = entry.manifest
    facts: dict[str, Any] = {
        "name": entry.name,
        "kind": entry.kind,
        "path": str(entry.path),
        "source": manifest.source,
        "revision": manifest.revision,
        "licence": manifest.licence,
        "added_at": manifest.added_at,
        "size_bytes": manifest.size_bytes,
    }
    facts |= of_path(entry.path)
    facts["files"] = [
        {"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256} for file in manifest.files
    ]
    return facts


def of_path(path: Path) -> dict[str, Any]:
    """Facts of a GGUF file, or of the folder of a model."""
    kind = kinds.detect_path(path)
    if kind == "adapter" and (path / "adapter_config.json").is_file():
        return _of_adapter(Adapter.open(path))
    if kind in ("gguf", "adapter"):
        files = [path] if path.is_file() else sorted(path.glob("*.gguf"))
        return _of_gguf([read_header(file) for file in files])
    return _of_checkpoint(path)


def _of_gguf(headers: list[Header]) -> dict[str, Any]:
    """Facts of one GGUF, whose pieces these are."""
    first = headers[0]
    n_parameters = sum(header.n_parameters for header in headers)
    tensor_bytes = sum(header.tensor_bytes for header in headers)
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for tensor in (tensor for header in headers for tensor in header.tensors):
        counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
        sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + tensor.size_bytes
    return {
        "format": f"GGUF v{first.version}",
        "architecture": first.architecture,
        "parameters": n_parameters,
        "tensors": sum(counts.values()),
        "bits_per_weight": round(8 * tensor_bytes / n_parameters, 3) if n_parameters else None,
        "types": {
            name: {"tensors": counts[name], "size_bytes": size}
            for name, size in sorted(sizes.items(), key=lambda item: -item[1])
        },
        "context_tokens": first.n_ctx_train,
        "embedding_width": first.hyperparameter("embedding_length"),
        "layers": first.hyperparameter("block_count"),
        "vocabulary": len(first.metadata.get("tokenizer.ggml.tokens", ())) or None,
        "chat_template": first.chat_template is not None,
        "stated_licence": first.metadata.get("general.license"),
    }


def _of_checkpoint(path: Path) -> dict[str, Any]:
    config = kinds.read_json(path / "config.json")
    nested = config.get("text_config")
    text: dict[str, Any] = nested if isinstance(nested, dict) else config
    files = [TensorFile.open(file) for file in sorted(path.rglob("*.safetensors"))]
    slots = [slot for file in files for slot in file.slots.values()]
    sizes: dict[str, int] = {}
    for slot in slots:
        sizes[slot.dtype] = sizes.get(slot.dtype, 0) + slot.end - slot.start
    return {
        "format": "safetensors",
        "architecture": ", ".join(config.get("architectures") or []) or config.get("model_type"),
        "parameters": sum(slot.n_elements for slot in slots),
        "tensors": len(slots),
        "types": {name: {"size_bytes": size} for name, size in sizes.items()},
        "context_tokens": text.get("max_position_embeddings"),
        "embedding_width": text.get("hidden_size"),
        "layers": text.get("num_hidden_layers"),
        "vocabulary": text.get("vocab_size"),
        "chat_template": _has_template(path),
    }


def _has_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    config = path / "tokenizer_config.json"
    return config.is_file() and "chat_template" in kinds.read_json(config)


def _of_adapter(adapter: Adapter) -> dict[str, Any]:
    config = adapter.config
    variant = "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return {
        "format": f"PEFT {variant}",
        "base_model": config.base_model,
        "rank": config.rank,
        "alpha": config.alpha,
        "modules": len(adapter.modules),
        "replaced_tensors": len(adapter.replaced),
        "parameters": sum(slot.n_elements for slot in adapter.file.slots.values()),
    }
