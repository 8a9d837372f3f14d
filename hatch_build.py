"""Compiles engine/kernels while lq is installed, against the headers of llama-cpp-python.

Both are compiled on the same machine, so for its CPU. LQ_KERNEL_FLAGS replaces that choice, for an image
that is to run elsewhere (Dockerfile). Without a compiler lq works too, with llama.cpp's own kernels, and
says so.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDER = Path("engine/kernels")
LIBRARY = FOLDER / "libkernels.so"
# Every symbol but those that ggml hands over is there, or it is no library.
LINKING = [] if sys.platform == "darwin" else ["-Wl,-z,defs"]


class KernelBuildHook(BuildHookInterface):
    """Runs for wheels and for editable installs; a source archive takes the source alone."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile, and mark the wheel as made for this machine."""
        if self.target_name != "wheel":
            return
        problem = compile_kernels(Path(self.root))
        if problem:
            self.app.display_warning(f"its kernels are left out, llama.cpp's own will serve: {problem}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].append(str(LIBRARY))


def compile_kernels(root: Path) -> str | None:
    """What stands in the way, or None when the library is there now."""
    headers = Path(sysconfig.get_path("purelib")) / "include"
    try:
        llama_version = version("llama-cpp-python")
    except PackageNotFoundError:
        return "llama-cpp-python is not installed here (pip needs --no-build-isolation)"
    if not (headers / "ggml.h").is_file():
        return f"{headers} has no ggml.h"
    flags = shlex.split(os.environ.get("LQ_KERNEL_FLAGS", "-march=native"))
    temporary = root / LIBRARY.with_suffix(".tmp")
    command = [
        *shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O3", *flags, "-shared", "-fPIC", *LINKING,
        f'-DLLAMA_VERSION="{llama_version}"', "-isystem", str(headers),
        *map(str, sorted((root / FOLDER).glob("*.cpp"))), "-o", str(temporary),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return f"no C++ compiler: {command[0]} is not installed"
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(command)}\n{error.stderr.strip()}"
    temporary.replace(root / LIBRARY)
    return None


if __name__ == "__main__":
    sys.exit(compile_kernels(Path(__file__).parent))
