"""Compiles lq's kernels while it is installed: the engine's, for llama-cpp-python's headers, and rounding's.

All are compiled on the machine that they run on, so for its CPU. LQ_KERNEL_FLAGS replaces that choice, for an
image that is to run elsewhere (Dockerfile). Without a compiler lq works too, with llama.cpp's own kernels and
with torch, and says so.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ENGINE = Path("engine/kernels/libkernels.so")
ROUNDING = Path("quantize/rounding/kernels/librounding.so")
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
            self.app.display_warning(f"kernels are left out, lq works without them, but slower: {problem}")
        for library in (ENGINE, ROUNDING):
            if (Path(self.root) / library).is_file():
                build_data["pure_python"] = False
                build_data["infer_tag"] = True
                build_data["artifacts"].append(str(library))


def compile_kernels(root: Path) -> str | None:
    """What stands in the way of either library, or None when both are there now."""
    problems = compile_library(root, ROUNDING, []), _compile_engine(root)
    return "; ".join(filter(None, problems)) or None


def _compile_engine(root: Path) -> str | None:
    headers = Path(sysconfig.get_path("purelib")) / "include"
    try:
        llama_version = version("llama-cpp-python")
    except PackageNotFoundError:
        return "llama-cpp-python is not installed here (pip needs --no-build-isolation)"
    if not (headers / "ggml.h").is_file():
        return f"{headers} has no ggml.h"
    return compile_library(root, ENGINE, [f'-DLLAMA_VERSION="{llama_version}"', "-isystem", str(headers)])


def compile_library(root: Path, library: Path, options: Sequence[str]) -> str | None:
    """Compile all sources in a library's folder; what stood in the way, or None when it is there now."""
    (root / library).unlink(missing_ok=True)  # one of other sources would be taken for this one
    flags = shlex.split(os.environ.get("LQ_KERNEL_FLAGS", "-march=native"))
    temporary = root / library.with_suffix(".tmp")
    command = [
        *shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O3", *flags, "-shared", "-fPIC", *LINKING,
        *options, "-I", str(root / ENGINE.parent),
        *map(str, sorted((root / library.parent).glob("*.cpp"))), "-o", str(temporary),
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return f"no C++ compiler: {command[0]} is not installed"
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(command)}\n{error.stderr.strip()}"
    temporary.replace(root / library)
    return None


if __name__ == "__main__":
    sys.exit(compile_kernels(Path(__file__).parent))
