"""Fetch a repository of the Hugging Face hub into a stage, through huggingface-hub's own cache.

Token, endpoint, cache and offline mode are huggingface-hub's environment variables (HF_TOKEN, HF_ENDPOINT,
HF_HOME, HF_HUB_OFFLINE); a cut download goes on where it stopped. Never fetches pickles or code.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from models.atomic import whole
from models.kinds import NotAModel, is_inside, refuse_pickles, wanted
from models.reference import HubReference
from models.source import DiskFull, Fetched, FetchFailed, Progress, disk_errors
from models.staging import Stage

_T = TypeVar("_T")
#: Moves huggingface-hub's cache, where downloads land before they are linked into the store.
_CACHE_VARIABLE = "HF_HOME"


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one commit: file -> bytes (None when the hub does not say)."""

    commit: str
    sizes: dict[str, int | None]
    licence: str | None


def fetch(reference: HubReference, stage: Stage, progress: Progress) -> Fetched:
    """Fetch the wanted files of the reference; every failure of the hub becomes one line."""
    progress(f"asking the hub for {reference.repo}", 0, None)
    listing = _explained(reference, lambda: _list(reference))
    names = choose(reference, listing.sizes)
    stage.pin(listing.commit)  # or a branch that moved between two runs would leave files of two commits
    sizes = {name: listing.sizes[name] or 0 for name in names}
    _check_space(reference, listing.commit, sizes, stage)
    done, total = 0, sum(sizes.values())
    for name in names:
        target = stage.content / (Path(name).name if name.endswith(".gguf") else name)
        if not target.exists():
            meter = _meter(progress, name, done, total)
            cached = _explained(reference, lambda n=name, m=meter: _download(reference, listing.commit, n, m))
            _place(cached, target)
        done += sizes[name]
        progress(name, done, total)
    return Fetched(source=reference.text, revision=listing.commit, licence=listing.licence)


def choose(reference: HubReference, paths: Iterable[str]) -> list[str]:
    """The files to fetch: the named GGUF, the GGUF of the named type, or a whole safetensors model."""
    paths = [path for path in paths if is_inside(path)]
    ggufs = sorted(p for p in paths if p.endswith(".gguf") and "mmproj" not in p.lower())
    if reference.file:
        if reference.file not in paths:
            raise FetchFailed(f"{reference.repo} holds no file {reference.file!r}; it has {_some(ggufs)}")
        return _pieces(reference.file, ggufs)
    if reference.variant:
        return _of_variant(reference, ggufs)
    names = wanted(paths)
    if any(name.endswith(".safetensors") for name in names):
        return names
    if len(ggufs) == 1 or (ggufs and _pieces(ggufs[0], ggufs) == ggufs):
        return ggufs
    if ggufs:
        raise FetchFailed(
            f"{reference.repo} holds {len(ggufs)} GGUF files; name one as hf:{reference.repo}/FILE.gguf or "
            f"its type as hf:{reference.repo}:Q4_K_M; it has {_some(ggufs)}"
        )
    refuse_pickles(f"hf:{reference.repo}", paths)
    raise NotAModel(f"hf:{reference.repo}", f"no .safetensors or .gguf files; it has {_some(sorted(paths))}")


def _of_variant(reference: HubReference, ggufs: list[str]) -> list[str]:
    variant = re.escape(str(reference.variant))
    pattern = re.compile(rf"(^|[-._/]){variant}([-._]0*\d+-of-\d+)?\.gguf$", re.IGNORECASE)
    found = [path for path in ggufs if pattern.search(path)]
    if not found:
        raise FetchFailed(
            f"{reference.repo} holds no GGUF of type {reference.variant}; it has {_some(ggufs)}"
        )
    if _pieces(found[0], ggufs) != found:
        raise FetchFailed(
            f"{reference.repo} holds several GGUF of type {reference.variant}: {_some(found)}; "
            f"name one as hf:{reference.repo}/FILE.gguf"
        )
    return found


def _pieces(path: str, ggufs: list[str]) -> list[str]:
    """All pieces of the split GGUF that `path` belongs to; just itself when it is whole."""
    split = re.fullmatch(r"(.*-)\d{5}(-of-\d{5}\.gguf)", path)
    if not split:
        return [path]
    return [p for p in ggufs if p.startswith(split[1]) and p.endswith(split[2]) and len(p) == len(path)]


def _some(paths: list[str]) -> str:
    shown = ", ".join(paths[:12]) or "none"
    return f"{shown} and {len(paths) - 12} more" if len(paths) > 12 else shown


def _list(reference: HubReference) -> Listing:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return _list_cache(reference)
    info = HfApi().model_info(reference.repo, revision=reference.revision, files_metadata=True)
    sizes = {entry.rfilename: entry.size for entry in info.siblings or []}
    card = info.card_data
    licence = getattr(card, "license", None) if card is not None else None
    if not info.sha:
        raise FetchFailed(
            f"hf:{reference.repo}: the hub at {constants.ENDPOINT} names no commit, so its files "
            "cannot be told apart from another revision's; set HF_ENDPOINT to a hub that does"
        )
    return Listing(commit=info.sha, sizes=sizes, licence=licence if licence != "other" else None)


def _list_cache(reference: HubReference) -> Listing:
    """What huggingface-hub's cache holds of the repository, for offline mode."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=reference.repo, repo_type="model")
    revision = reference.revision or constants.DEFAULT_REVISION
    pointer = folder / "refs" / revision
    commit = pointer.read_text("utf-8").strip() if pointer.is_file() else revision
    snapshot = folder / "snapshots" / commit
    if not snapshot.is_dir():
        raise FetchFailed(
            f"hf:{reference.repo} is not in the local cache {constants.HF_HUB_CACHE} and HF_HUB_OFFLINE is "
            "set; unset it or fetch the repository on a machine with a network"
        )
    files = [path for path in snapshot.rglob("*") if path.is_file()]
    sizes: dict[str, int | None] = {p.relative_to(snapshot).as_posix(): p.stat().st_size for p in files}
    return Listing(commit=commit, sizes=sizes, licence=None)


def _download(reference: HubReference, commit: str, name: str, meter: type) -> Path:
    from huggingface_hub import constants, hf_hub_download

    with disk_errors(Path(constants.HF_HUB_CACHE), variable=_CACHE_VARIABLE):
        return Path(hf_hub_download(reference.repo, name, revision=commit, tqdm_class=meter))


def _place(cached: Path, target: Path) -> None:
    """Link the cache's immutable blob into the stage; copy where links cannot go."""
    target.parent.mkdir(parents=True, exist_ok=True)
    blob = cached.resolve()
    try:
        os.link(blob, target)
    except OSError:
        with whole(target) as partial:
            shutil.copyfile(blob, partial)


def _meter(progress: Progress, name: str, done: int, total: int) -> type:
    """A tqdm class, as huggingface-hub wants one, that reports to `progress` and draws nothing."""
    from tqdm.auto import tqdm

    class Meter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            kwargs["disable"] = True
            super().__init__(*args, **kwargs)
            self.n = kwargs.get("initial") or 0

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            progress(name, done + int(self.n), total)
            return None

    return Meter


def _check_space(reference: HubReference, commit: str, sizes: dict[str, int], stage: Stage) -> None:
    """Refuse before the first byte when a disk cannot take what it does not hold yet.

    That is the cache's disk, and the store's where the cache lies on another, so that files are copied.
    """
    from huggingface_hub import constants, try_to_load_from_cache

    held = {n for n in sizes if isinstance(try_to_load_from_cache(reference.repo, n, revision=commit), str)}
    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    needed = sum(size for name, size in sizes.items() if name not in held)
    _refuse_if_full(cache, needed, _CACHE_VARIABLE)
    if cache.stat().st_dev != stage.content.stat().st_dev:
        staged = sum(path.stat().st_size for path in stage.content.rglob("*") if path.is_file())
        _refuse_if_full(stage.folder, sum(sizes.values()) - staged, "LQ_HOME")


def _refuse_if_full(folder: Path, needed_bytes: int, variable: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskFull(folder, needed_bytes=needed_bytes, free_bytes=free, variable=variable)


def _explained(reference: HubReference, call: Callable[[], _T]) -> _T:
    """Run a call of huggingface-hub; its failures become FetchFailed with a remedy."""
    from huggingface_hub import errors

    # The base of every failure of huggingface-hub's HTTP client, which was httpx and is its successor now.
    transport = cast("type[Exception]", errors.HfHubHTTPError.__bases__[0])
    where = f"hf:{reference.repo}"
    try:
        return call()
    except errors.GatedRepoError:
        raise FetchFailed(
            f"{where} is gated: accept its licence on the model's page, then set HF_TOKEN to a token of yours"
        ) from None
    except errors.RepositoryNotFoundError:
        raise FetchFailed(
            f"{where} does not exist, or is private: check the spelling, or set HF_TOKEN to a token that "
            "may read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise FetchFailed(f"{where} has no revision {reference.revision!r}; check the part after @") from None
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        raise FetchFailed(
            f"{where} cannot be fetched: no connection to the hub, or HF_HUB_OFFLINE is set "
            f"({_first_line(error)}); without a network use a pypi: or file: reference"
        ) from None
    except errors.HFValidationError as error:
        raise FetchFailed(f"{where} is not a repository's name: {_first_line(error)}") from None
    except errors.HfHubHTTPError as error:
        raise FetchFailed(f"{where}: the hub answered {_first_line(error)}; try again later") from None
    except transport as error:
        raise FetchFailed(
            f"{where} cannot be fetched: no connection to the hub ({_first_line(error)}); run it again, or "
            "without a network use a pypi: or file: reference"
        ) from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise FetchFailed(f"{where} cannot be fetched: {_first_line(error)}; run it again") from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
