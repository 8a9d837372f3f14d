"""[models.NAME] of lq.toml: which model, how it is loaded, how long it stays.

None leaves the choice to server/shape.py and server/placing.py, which look at the model and the machine.
"""

import re
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from engine.request import KVType
from server.schema.sampling import Count

ContextTokens = Annotated[int, Meta(ge=16, le=2**24)]
Cells = Annotated[int, Meta(ge=16, le=2**31 - 1)]
CacheMegabytes = Annotated[int, Meta(ge=0, le=2**24)]

DURATION = re.compile(r"(?:([0-9]+)h)?(?:([0-9]+)m)?(?:([0-9]+)s)?")
ADAPTER_NAME = re.compile(r"\w[\w.-]{0,99}")
MAX_DURATION_S = 366 * 24 * 3600


class Adapter(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A LoRA adapter and how strongly it counts."""

    path: str
    scale: Annotated[float, Meta(ge=-100, le=100)] = 1.0


class Model(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """[models.NAME]"""

    model: str | None = None  # store name or path of a GGUF; None: NAME is a store name
    # How an embedding model makes one vector of a text's tokens: mean, cls or last; None: as its file says.
    pooling: Literal["mean", "cls", "last"] | None = None
    n_ctx: ContextTokens | None = None  # tokens of one request, answer included
    n_parallel: Annotated[int, Meta(ge=1, le=256)] | None = None  # requests decoded together
    kv_cells: Cells | None = None  # tokens of all requests together
    kv_type_k: KVType | Literal["auto"] = "auto"  # of keys; auto: f16, or smaller where the context needs it
    kv_type_v: KVType | Literal["auto"] = "auto"  # of values
    threads: Annotated[int, Meta(ge=1, le=512)] | None = None  # None: physical cores
    gpu_layers: Count | None = None  # the output head is one; None: as many as fit, if there is a GPU
    mmap: bool | None = None  # weights stay in the file's pages; None: when memory is short
    max_queue: Annotated[int, Meta(ge=0, le=2**20)] = 256  # requests that may wait
    max_stall_ms: Annotated[int, Meta(ge=10, le=60_000)] = (
        250  # running answers wait so long for a prompt's step
    )
    cache_ram_mb: CacheMegabytes = 512  # MiB of prefixes kept in memory beside the KV cache
    cache_disk_mb: CacheMegabytes = 0  # MiB of prefixes kept on disk over restarts
    speculation: Literal["auto", "off"] = "auto"  # draft the next tokens where that is measured to pay
    draft_model: str | None = None  # store name or path of a small GGUF of the same vocabulary that drafts
    lora: tuple[str | Adapter, ...] = ()  # applied to every request
    adapters: dict[str, str | Adapter] = msgspec.field(default_factory=dict)  # by name, for requests that ask
    preload: bool | None = None  # load at start; None: if named on the command line, or the only one
    keep_alive: str | int | None = (
        None  # stay so long without a request; None: forever if preloaded, else 10m
    )

    def __post_init__(self) -> None:
        for name in self.adapters:
            if not ADAPTER_NAME.fullmatch(name):
                raise ValueError(f"adapters: {name[:100]!r} is no name: use letters, digits, `-`, `_`, `.`")
        if self.keep_alive is not None:
            try:
                seconds(self.keep_alive)
            except ValueError as error:
                raise ValueError(f"keep_alive: {error}") from None
        if self.kv_cells is not None and self.n_ctx is not None and self.kv_cells < self.n_ctx:
            raise ValueError(
                f"kv_cells is {self.kv_cells}, less than the {self.n_ctx} of n_ctx that one request may use"
            )


def seconds(duration: str | int) -> float | None:
    """Of "forever" (None), "90s", "10m", "1h30m" or a number of seconds; ValueError for anything else."""
    if duration == "forever":
        return None
    text = str(duration)
    match = DURATION.fullmatch(text)
    if text.isascii() and text.isdecimal():
        total = int(text[:12])
    elif match and text:
        hours, minutes, rest = (int((part or "0")[:12]) for part in match.groups())
        total = 3600 * hours + 60 * minutes + rest
    else:
        raise ValueError(
            f'{text[:50]!r} is no duration: give one such as "10m", "90s", "1h30m", "0" or "forever"'
        )
    if total > MAX_DURATION_S:
        raise ValueError(f'{text[:50]!r} is longer than a year: give "forever"')
    return float(total)


def joined(configured: Model, given: Model) -> Model:
    """A model of the configuration file that the command line names too: its own options, more adapters."""
    preload = given.preload if configured.preload is None else configured.preload
    return msgspec.structs.replace(
        configured,
        lora=(*configured.lora, *given.lora),
        adapters=configured.adapters | given.adapters,
        preload=preload,
    )
