"""llama.cpp's own tools, built from the sources inside the llama-cpp-python sdist that lq runs on.

So the peer is the same commit, compiled with the same flags by the same compiler; it is cached outside the
repository. LQ_PEER_BIN names a folder that has the binaries already.
"""

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from platformdirs import user_cache_path

TOOLS = ("llama-server", "llama-quantize", "llama-imatrix", "llama-perplexity", "llama-bench")


def peer_binaries() -> Path:
    """The folder with llama.cpp's tools; builds them on first use (about 7 minutes on 2 cores)."""
    given = os.environ.get("LQ_PEER_BIN")
    if given:
        return Path(given)
    release = version("llama-cpp-python")
    home = user_cache_path("lq") / f"peer-{release}"
    binaries = home / "build" / "bin"
    if not all((binaries / tool).exists() for tool in TOOLS):
        build(unpack(home, release), home / "build")
    return binaries


def unpack(home: Path, release: str) -> Path:
    """The llama.cpp tree of the sdist, downloaded by pip and unpacked into `home`."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*command, "--dest", home, f"llama-cpp-python=={release}"], check=True)
    (archive,) = home.glob("llama_cpp_python-*.tar.gz")
    shutil.unpack_archive(archive, home)
    return home / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"


def build(source: Path, target: Path) -> None:
    """Compile the tools with llama.cpp's defaults, which are what the Python wheel is built with too."""
    flags = [f"-D{option}=OFF" for option in ("LLAMA_BUILD_TESTS", "LLAMA_OPENSSL", "LLAMA_CURL")]
    subprocess.run(["cmake", "-S", source, "-B", target, "-DCMAKE_BUILD_TYPE=Release", *flags], check=True)
    jobs = str(os.cpu_count() or 2)
    subprocess.run(["cmake", "--build", target, "-j", jobs, "--target", *TOOLS], check=True)
