"""What this machine has for models: memory, cores, and the GPU's memory where llama.cpp uses one.

Asked once at start, without loading llama.cpp into the server's process.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine.memory import available_memory
from models.placement import Bytes

#: Of what is free at start, models take so much; the rest is for prompts, documents and other programs.
SHARE = 0.8
#: The same of a GPU's memory, which nothing else is there for; the rest is lost between GPUs and layers.
DEVICE_SHARE = 0.9
SMI = ("--query-gpu=memory.free", "--format=csv,noheader,nounits")
SMI_S = 20.0


@dataclass(frozen=True, slots=True)
class Machine:
    """`available_bytes` are the host's; `device_bytes` the GPU's, None where llama.cpp has no GPU to use."""

    available_bytes: int
    n_cores: int
    device_bytes: int | None = None

    @property
    def on_gpu(self) -> bool:
        return self.device_bytes is not None

    def budget(self, memory_budget_mb: float | None, gpu_memory_budget_mb: float | None = None) -> Bytes:
        """What all models together may take; MiB given by the operator come first."""
        device = self.device_bytes or 0
        return Bytes(
            _given(memory_budget_mb, int(SHARE * self.available_bytes)),
            _given(gpu_memory_budget_mb, int(DEVICE_SHARE * device)) if device else 0,
        )


def _given(mebibytes: float | None, otherwise: int) -> int:
    return otherwise if mebibytes is None else int(mebibytes * 2**20)


def this_machine() -> Machine:
    """As it is now."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(available_memory(), n_cores, free_vram() if built_for_cuda() else None)


def built_for_cuda() -> bool:
    """Whether the installed llama.cpp has a CUDA backend, told by its files."""
    found = find_spec("llama_cpp")
    folder = Path(found.origin).parent / "lib" if found and found.origin else None
    return folder is not None and any(folder.glob("*ggml-cuda*"))


def torch_for_cuda() -> bool:
    """Whether the installed torch, which runs embedders, was built for CUDA, told by its files."""
    found = find_spec("torch")
    folder = Path(found.origin).parent / "lib" if found and found.origin else None
    return folder is not None and any(folder.glob("*torch_cuda*"))


def free_vram() -> int | None:
    """Bytes free on the NVIDIA GPUs that this process may use; None without one, or its driver's tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and (not chosen.strip() or chosen.strip().startswith("-")):  # CUDA's "none"
        return None
    only = [f"--id={chosen}"] if chosen else []
    try:
        output = subprocess.run(
            [tool, *SMI, *only], capture_output=True, text=True, timeout=SMI_S, check=True
        ).stdout
        return sum(int(line) for line in output.split()) * 2**20 or None
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
