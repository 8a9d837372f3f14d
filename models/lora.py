"""Read a PEFT LoRA adapter and merge it, one tensor at a time, in float32.

LoRA, rsLoRA, rank and alpha patterns, DoRA, embeddings and modules_to_save; everything else is refused by
name. Knows Hugging Face tensor names; nothing of GGUF.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.errors import ModelsError
from models.lora_config import InvalidAdapter, LoraConfig, UnsupportedAdapter, read_config
from models.source import PICKLE_SUFFIXES
from models.tensors import TensorFile

__all__ = ["Adapter", "AdapterMismatch", "Factors", "InvalidAdapter", "UnsupportedAdapter"]

_ROLES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_embedding_A": "embedding_a",
    ".lora_embedding_B": "embedding_b",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.weight": "base",
}
_EMBEDDING, _HEAD = "embed_tokens", "lm_head"


class AdapterMismatch(ModelsError):
    """An adapter of another model: modules that match nothing, or shapes that differ."""


@dataclass(frozen=True, slots=True)
class Factors:
    """The low-rank factors of one module as float32: delta W = scale * b @ a, (out, rank) @ (rank, in).

    For an embedding `a` is (rank, vocabulary), `b` (width, rank) and delta W = scale * (b @ a).T.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None
    embedding: bool

    @property
    def rank(self) -> int:
        """The inner dimension of the factors."""
        return self.a.shape[0]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter; tensors are read when a module is merged.

    Names are compared without the leading `base_model.model.`, `model.` and `language_model.`, which differ
    between a checkpoint and the class an adapter was trained with.
    """

    path: Path
    config: LoraConfig
    file: TensorFile
    roles: dict[str, dict[str, str]]  # module -> role -> name in the file
    replacements: dict[str, str]  # tensor of the model -> name in the file
    paths: dict[str, str]  # module -> its path as PEFT's patterns see it

    @classmethod
    def open(cls, path: Path) -> "Adapter":
        """Check the adapter in folder `path`; raises UnsupportedAdapter or InvalidAdapter."""
        config = read_config(path)
        file = TensorFile.open(_weights(path))
        adapter = cls(path, config, file, {}, {}, {})
        for name in file.slots:
            adapter._sort(name)
        if not adapter.roles and not adapter.replacements:
            raise InvalidAdapter(path, "adapter_model.safetensors holds no tensors")
        for module in adapter.roles:
            adapter._check(module)
        touched = {_EMBEDDING, _HEAD} & {name.removesuffix(".weight") for name in adapter.names}
        if config.ensure_weight_tying and touched:
            raise UnsupportedAdapter(path, "ensure_weight_tying", True)
        return adapter

    @property
    def modules(self) -> tuple[str, ...]:
        """Modules with low-rank factors, as in the checkpoint less their prefix (`layers.0.mlp.up_proj`)."""
        return tuple(sorted(self.roles))

    @property
    def replaced(self) -> tuple[str, ...]:
        """Tensors that the adapter holds whole (modules_to_save), named like `modules`."""
        return tuple(sorted(self.replacements))

    @property
    def names(self) -> set[str]:
        """Every tensor of the model that the adapter changes, named like `modules`, `.weight` included."""
        return {f"{module}.weight" for module in self.roles} | set(self.replacements)

    @property
    def splits_tied_head(self) -> bool:
        """Whether embedding and output head differ after the merge although the base model ties them.

        A converter of such a model then writes a head of its own: merge("lm_head.weight", embedding).
        """
        return bool({f"{_EMBEDDING}.weight", f"{_HEAD}.weight"} & self.names)

    def changes(self, name: str) -> bool:
        """Whether merge() would return other values for this tensor of the checkpoint."""
        return canonical(name) in self.names

    def merge(self, name: str, weight: np.ndarray) -> np.ndarray:
        """The checkpoint's tensor `name` with the adapter merged, float32; untouched ones as they are."""
        key = canonical(name)
        module = key.removesuffix(".weight")
        weight = np.asarray(weight, np.float32)
        if key in self.replacements:
            weight = self._replacement(name, key, weight)
        if key == module or module not in self.roles:
            return weight
        if "base" in self.roles[module]:
            weight = self._same_shape(name, weight, self.file.read(self.roles[module]["base"]))
        merged = self._merged(name, weight, self.factors(module))
        if not np.isfinite(merged).all():
            raise InvalidAdapter(
                self.path, f"merging {name} gives values that are not finite; train it again"
            )
        return merged

    def factors(self, module: str) -> Factors:
        """The factors of a module of `modules`, read from the file."""
        roles = self.roles[module]
        embedding = "embedding_a" in roles
        a, b = ("embedding_a", "embedding_b") if embedding else ("a", "b")
        return Factors(
            a=self.file.read(roles[a]),
            b=self.file.read(roles[b]),
            scale=self.config.scale_of(self.paths[module]),
            magnitude=self.file.read(roles["magnitude"]).reshape(-1) if "magnitude" in roles else None,
            embedding=embedding,
        )

    def unused(self, names_seen: Collection[str]) -> None:
        """Raise AdapterMismatch unless every tensor it changes is among the checkpoint's `names_seen`."""
        missing = sorted(self.names - {canonical(name) for name in names_seen})
        if missing:
            base = f" (it was trained on {self.config.base_model})" if self.config.base_model else ""
            raise AdapterMismatch(
                f"{self.path} is an adapter of another model{base}: {len(missing)} of its {len(self.names)} "
                f"tensors match nothing here: {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; "
                "give the model that it was trained on"
            )

    def _merged(self, name: str, weight: np.ndarray, factors: Factors) -> np.ndarray:
        flipped = factors.embedding or self.config.fan_in_fan_out
        expected = (factors.b.shape[0], factors.a.shape[1])
        rows = weight.T if flipped else weight
        if rows.shape != expected:
            raise self._mismatch(name, weight.shape, expected[::-1] if flipped else expected)
        merged = factors.b @ factors.a
        merged *= np.float32(factors.scale)
        merged += rows
        if factors.magnitude is not None:
            norm = np.linalg.norm(merged, axis=1)
            if factors.magnitude.shape != norm.shape:
                raise self._mismatch(f"the magnitude of {name}", norm.shape, factors.magnitude.shape)
            with np.errstate(divide="ignore", invalid="ignore"):
                merged *= (factors.magnitude / norm)[:, None]
        return np.ascontiguousarray(merged.T if flipped else merged)

    def _replacement(self, name: str, key: str, weight: np.ndarray) -> np.ndarray:
        return self._same_shape(name, weight, self.file.read(self.replacements[key]))

    def _same_shape(self, name: str, weight: np.ndarray, replacement: np.ndarray) -> np.ndarray:
        if replacement.shape != weight.shape:
            raise self._mismatch(name, weight.shape, replacement.shape)
        return replacement

    def _mismatch(self, name: str, model: tuple[int, ...], adapter: tuple[int, ...]) -> AdapterMismatch:
        base = f"it was trained on {self.config.base_model}; " if self.config.base_model else ""
        return AdapterMismatch(
            f"{self.path} is an adapter of another model: {name} is {list(model)} here and {list(adapter)} "
            f"in the adapter; {base}give the model that it was trained on"
        )

    def _sort(self, name: str) -> None:
        """File one tensor under its module and role, or as a replacement."""
        for suffix, role in _ROLES.items():
            if name.endswith(suffix):
                path = name.removesuffix(suffix)
                module = canonical(path)
                if role in self.roles.setdefault(module, {}):
                    raise InvalidAdapter(self.path, f"two tensors claim the {role} of {module}")
                self.roles[module][role] = name
                self.paths[module] = path.removeprefix("base_model.model.")
                return
        if ".lora_" in name:
            raise UnsupportedAdapter(self.path, "tensor", name)
        if not name.endswith(".original_module.weight"):
            self.replacements[canonical(name.replace(".modules_to_save.", "."))] = name

    def _check(self, module: str) -> None:
        """Factors complete, two-dimensional, of the rank that the configuration says."""
        roles = self.roles[module]
        pair = ("embedding_a", "embedding_b") if "embedding_a" in roles else ("a", "b")
        if not set(pair) <= roles.keys():
            raise InvalidAdapter(self.path, f"{module} has only one of lora_A and lora_B; save it again")
        if self.config.use_dora != ("magnitude" in roles):
            raise InvalidAdapter(
                self.path, f"use_dora is {self.config.use_dora}, which {module}'s tensors contradict"
            )
        a, b = (self.file.slots[roles[role]].shape for role in pair)
        rank = self.config.rank_of(self.paths[module])
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise InvalidAdapter(
                self.path, f"{module} has factors {list(a)} and {list(b)}, its rank should be {rank}"
            )


def canonical(name: str) -> str:
    """A tensor or module name without the prefixes that depend on the class around the model."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in ("base_model", "model", "language_model"):
        parts.pop(0)
    return ".".join(parts)


def _weights(path: Path) -> Path:
    file = path / "adapter_model.safetensors"
    if file.is_file():
        return file
    pickles = sorted(p.name for p in path.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise InvalidAdapter(
            path,
            f"its weights are a pickle ({pickles[0]}), which can run code when opened; save it again with "
            "save_pretrained(..., safe_serialization=True)",
        )
    raise InvalidAdapter(path, "adapter_model.safetensors is missing; give the folder that PEFT saved")
