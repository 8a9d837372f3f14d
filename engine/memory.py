"""Where a model's weights lie: in memory of their own when there is room, else in the file's pages.

On a CPU every token reads all weights. Pages of a file are 4 KiB, and looking up so many addresses costs
time; memory of our own comes in huge pages (2 MiB) where the system has them. Measured with a 135M model on
two cores: 10 % more tokens/s (docs/log.md). Pages of the file have their merits too: engines of one model
share them, and a model larger than the memory still runs, slowly.
"""

import os
from pathlib import Path

from engine.request import EngineConfig

#: Makes glibc ask for huge pages; read when a process starts. Other C libraries ignore it.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
TUNABLES = "GLIBC_TUNABLES"
CGROUP = Path("/sys/fs/cgroup")
SHARE = 0.5  # of the memory that is free now, which weights may take as their own


def environment(given: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """The variables that an engine's process is to start with, beside those `given`."""
    tunables = given.get(TUNABLES, "")
    if "glibc.malloc.hugetlb" in tunables:  # the operator's choice
        return {}
    return {TUNABLES: f"{tunables}:{HUGE_PAGES}" if tunables else HUGE_PAGES}


def uses_mmap(config: EngineConfig, *, on_gpu: bool, available_bytes: int | None = None) -> bool:
    """Whether the weights stay in the file's pages; on a GPU they are only passing through."""
    if config.use_mmap is not None:
        return config.use_mmap
    if on_gpu:
        return True
    available = available_memory() if available_bytes is None else available_bytes
    return config.model_path.stat().st_size > SHARE * available


def available_memory() -> int:
    """Bytes that this process may still take: what the machine has, and what its control group leaves."""
    import psutil

    free = psutil.virtual_memory().available
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (allowed := limit.read_text().strip()) != "max":
        free = min(free, int(allowed) - int(used.read_text()) + _reclaimable())
    return max(0, free)


def _reclaimable() -> int:
    """Pages of files that a control group is charged for and gives up at once: those not used of late."""
    file = CGROUP / "memory.stat"
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
