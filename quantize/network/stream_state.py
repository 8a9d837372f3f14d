"""Where a pass through the layers stands, on disk, so that one that was stopped goes on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.atomic import whole


@dataclass(frozen=True, slots=True)
class StreamState:
    """Hidden states by name and how many layers made them, in one file; of another `key` none is there."""

    path: Path
    key: str

    def save(self, done: int, hidden: Mapping[str, Tensor]) -> None:
        """Store them whole, in place of earlier ones."""
        tensors = {name: tensor.contiguous().cpu() for name, tensor in hidden.items()}
        with whole(self.path) as partial:
            save_file(tensors, partial, metadata={"key": self.key, "done": str(done)})

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """What was saved last."""
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("key") != self.key:
                    return None
                return int(metadata["done"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (FileNotFoundError, SafetensorError):
            return None
