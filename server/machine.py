"""What this machine has for models: memory, cores, whether llama.cpp uses its GPU.

Asked once at start, without loading llama.cpp into the server's process.
"""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from engine.memory import available_memory

#: Of what is free at start, models take so much; the rest is for prompts, documents and other programs.
SHARE = 0.8
SMI = ("--query-gpu=memory.free", "--format=csv,noheader,nounits")
SMI_S = 20.0


@dataclass(frozen=True, slots=True)
class Machine:
    """The memory that models are loaded into is the GPU's when llama.cpp was built for it and finds one."""

    available_bytes: int
    n_cores: int
    on_gpu: bool = False

    def budget(self, memory_budget_mb: float | None) -> int:
        """Bytes that all models together may take; MiB given by the operator come first."""
        if memory_budget_mb is not None:
            return int(memory_budget_mb * 2**20)
        return int(SHARE * self.available_bytes)


def this_machine() -> Machine:
    """As it is now."""
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    vram = free_vram() if built_for_cuda() else None
    return Machine(vram or available_memory(), n_cores, on_gpu=vram is not None)


def built_for_cuda() -> bool:
    """Whether the installed llama.cpp has a CUDA backend, told by its files."""
    found = find_spec("llama_cpp")
    folder = Path(found.origin).parent / "lib" if found and found.origin else None
    return folder is not None and any(folder.glob("*ggml-cuda*"))


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
