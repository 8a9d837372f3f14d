"""Which engines the settings ask for: one a distinct model, set of adapters and options; how large each is.

Names are resolved and headers read before any process starts; what starts and ends them is server/fleet.py.
"""

import hashlib
import re
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import msgspec

from engine.request import (
    EngineConfig,
    EngineInfo,
    Event,
    GenerationRequest,
    Kind,
    Pooled,
    PooledRequest,
    Read,
)
from engine.stats import EngineStats
from models.footprint import Footprint, footprint, pieces_of
from models.gguf import Header, read_header
from models.lora_gguf import convert_adapter
from models.store import Store
from server import pooled, shape
from server.errors import ModelTooLarge
from server.machine import Machine, this_machine
from server.model_settings import Adapter, seconds
from server.model_settings import Model as ModelSettings
from server.settings import Settings, SettingsError

#: gguf token types (llama.cpp): control tokens, such as <|im_end|>, must not come out of a user's text.
CONTROL_TOKEN = 3
#: Seconds that an engine which was started on first use stays without a request, unless told otherwise.
KEEP_ALIVE_S = 600.0


class Engine(Protocol):
    """What the server asks of an engine (engine.client.Engine is one)."""

    info: EngineInfo

    @property
    def alive(self) -> bool: ...

    @property
    def pid(self) -> int | None: ...

    def submit(self, request: GenerationRequest) -> AsyncIterator[Event]: ...

    def pool(self, request: PooledRequest) -> AsyncGenerator[Read | Pooled, None]: ...

    async def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> Sequence[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> str: ...

    async def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


Start = Callable[[EngineConfig], Awaitable[Engine]]


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model's file says of itself."""

    architecture: str
    description: str  # such as "llama 135M Q4_1"
    n_ctx_train: int | None
    n_params: int
    size_bytes: int

    @classmethod
    def of(cls, pieces: Sequence[Header]) -> "Facts":
        header = pieces[0]
        n_params = sum(piece.n_parameters for piece in pieces)
        label = header.metadata.get("general.size_label")
        size = label if isinstance(label, str) and label else f"{n_params / 1e6:.0f}M"
        widest = next(iter(header.types), None)
        return cls(
            architecture=header.architecture or "",
            description=" ".join(filter(None, [header.architecture, size, widest.name if widest else ""])),
            n_ctx_train=header.n_ctx_train,
            n_params=n_params,
            size_bytes=sum(piece.tensor_bytes for piece in pieces),
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """A resolved engine, not started; `control` matches the model's control tokens in a text."""

    name: str
    config: EngineConfig
    control: re.Pattern[str] | None
    facts: Facts
    footprint: Footprint
    keep_alive_s: float | None = None  # without a request; None: until its room is needed
    preload: bool = True
    adapter_scales: Mapping[str, float] = field(default_factory=dict)  # of those that a request may name


def plan(settings: Settings, store: Store, machine: Machine | None = None) -> dict[str, Plan]:
    """A plan for every model and assistant by its name; those that can share an engine have equal configs.

    Raises SettingsError for a model that is to be loaded at start and is too large for this machine.
    """
    machine = machine or this_machine()
    budget_bytes = machine.budget(settings.server.memory_budget_mb)
    drafts = _drafts(settings, store)
    distinct = list(dict.fromkeys(draft.key for draft in drafts.values()))
    bases = {draft.key: draft.cost(0, draft.model.n_parallel or 1).total_bytes for draft in drafts.values()}
    rooms = dict(zip(distinct, shape.rooms([bases[key] for key in distinct], budget_bytes), strict=True))
    plans = {name: draft.plan(rooms[draft.key], machine) for name, draft in drafts.items()}
    return _timed(plans, drafts, budget_bytes)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A model with its adapters, found and read; what it gets of the machine is open yet."""

    name: str
    model: ModelSettings
    pieces: tuple[Header, ...]
    drafter: tuple[Header, ...]  # of the small model that drafts tokens, if any
    lora: tuple[tuple[Path, float], ...]
    adapters: Mapping[str, tuple[Path, float]]  # by name
    cache_folder: Path | None
    is_assistants: bool
    kind: Kind = "text"

    @property
    def path(self) -> Path:
        return self.pieces[0].path

    @property
    def key(self) -> Hashable:
        """Equal for those that can share an engine."""
        plain = {"model": None, "lora": (), "adapters": {}, "preload": None, "keep_alive": None}
        options = msgspec.structs.replace(self.model, **plain)
        return self.path, self.lora, tuple(self._adapters), msgspec.json.encode(options)

    @property
    def _adapters(self) -> Iterator[tuple[str, Path]]:
        return ((name, path) for name, (path, _) in self.adapters.items())

    def cost(self, n_cells: int, n_parallel: int, *, n_drafted: int | None = None) -> Footprint:
        """What it takes with so many cells for so many sequences; `n_drafted`: cells of the draft model."""
        model = self.model
        if self.kind != "text":
            return pooled.cost(self.pieces, n_cells, n_parallel)
        own = footprint(
            self.pieces, n_cells=n_cells, n_parallel=n_parallel,
            type_k=model.kv_type_k, type_v=model.kv_type_v,
        )  # fmt: skip
        adapters = [*self.lora, *self.adapters.values()]
        weights = own.weights_bytes + sum(path.stat().st_size for path, _ in adapters)
        kv = own.kv_bytes
        if self.drafter:
            draft = footprint(self.drafter, n_cells=n_drafted or n_cells, n_parallel=n_parallel)
            weights, kv = weights + draft.weights_bytes, kv + draft.kv_bytes
        return Footprint(weights, kv, own.compute_bytes, model.cache_ram_mb * 2**20)

    def plan(self, room_bytes: int, machine: Machine) -> Plan:
        model, facts = self.model, Facts.of(self.pieces)
        if self.kind != "text":
            config = pooled.config(
                self.name, self.kind, model, self.pieces, room_bytes=room_bytes, on_gpu=machine.on_gpu
            )
            config.validate()
            return Plan(self.name, config, None, facts, self.cost(config.n_ctx, config.n_parallel))
        chosen = shape.choose(
            self.cost, n_ctx_train=facts.n_ctx_train, room_bytes=room_bytes, n_cores=machine.n_cores,
            on_gpu=machine.on_gpu and model.gpu_layers != 0,
            n_ctx=model.n_ctx, n_parallel=model.n_parallel, kv_cells=model.kv_cells,
        )  # fmt: skip
        config = EngineConfig(
            model_path=self.path,
            n_ctx=chosen.n_ctx,
            n_parallel=chosen.n_parallel,
            kv_cells=None if chosen.n_cells == chosen.n_ctx * chosen.n_parallel else chosen.n_cells,
            n_threads=model.threads,
            n_gpu_layers=model.gpu_layers,
            use_mmap=model.mmap,
            kv_type_k=model.kv_type_k,
            kv_type_v=model.kv_type_v,
            lora=self.lora,
            adapters=tuple(self._adapters),
            max_queue=model.max_queue,
            max_stall_ms=model.max_stall_ms,
            cache_ram_mb=model.cache_ram_mb,
            cache_disk_mb=model.cache_disk_mb,
            cache_folder=self.cache_folder,
            speculation=model.speculation,
            draft_model=self.drafter[0].path if self.drafter else None,
        )
        config.validate()
        memory = self.cost(
            chosen.n_cells, chosen.n_parallel, n_drafted=chosen.n_ctx * chosen.n_parallel
        )  # a draft model never shares its cells
        scales = {name: scale for name, (_, scale) in self.adapters.items()}
        return Plan(self.name, config, control_tokens(self.pieces[0]), facts, memory, adapter_scales=scales)


def _drafts(settings: Settings, store: Store) -> dict[str, _Draft]:
    drafts: dict[str, _Draft] = {}
    for name, model in settings.models.items():
        drafts[name] = _draft(name, name, model, model.lora, store)
    for name, assistant in settings.assistants.items():
        base = settings.models[assistant.model]
        if assistant.lora:
            drafts[name] = _draft(name, assistant.model, base, [*base.lora, *assistant.lora], store)
        else:
            drafts[name] = drafts[assistant.model]
    return drafts


def _draft(
    name: str, model_name: str, model: ModelSettings, lora: Sequence[str | Adapter], store: Store
) -> _Draft:
    path = store.resolve_model(model.model or model_name)
    header = read_header(path).require("model")
    kind = pooled.kind_of(header, model)
    if kind != "text":
        pooled.check(model_name, kind, model)
    adapters = tuple(_adapter(entry, path, store) for entry in lora)
    named = {each: _adapter(entry, path, store) for each, entry in model.adapters.items()}
    drafter = store.resolve_model(model.draft_model) if model.draft_model else None
    pieces = tuple(pieces_of(header))
    folder = None
    if model.cache_disk_mb:
        files = [*(each.path for each in pieces), *(each for each, _ in (*adapters, *named.values()))]
        mark = _fingerprint(
            files, model.kv_type_k, model.kv_type_v, model.gpu_layers, adapters, list(named), _library()
        )
        folder = store.root / "cache" / "prefixes" / mark
    return _Draft(
        name=name,
        model=model,
        pieces=pieces,
        drafter=tuple(pieces_of(read_header(drafter).require("model"))) if drafter else (),
        lora=adapters,
        adapters=named,
        cache_folder=folder,
        is_assistants=name != model_name,
        kind=kind,
    )


def _timed(plans: dict[str, Plan], drafts: Mapping[str, _Draft], budget_bytes: int) -> dict[str, Plan]:
    """The same with what is loaded at start and how long each stays.

    Of those to be loaded at start, as many as fit together, in the order of the settings.
    """
    is_only = len({plan.config for plan in plans.values()}) == 1
    loaded: set[EngineConfig] = set()
    left = budget_bytes
    for plan in plans.values():
        draft = drafts[plan.name]
        wanted = is_only or (bool(draft.model.preload) and not draft.is_assistants)
        if draft.model.preload is False or not wanted or plan.config in loaded:
            continue
        size = plan.footprint.total_bytes
        if size > budget_bytes:
            raise SettingsError(str(ModelTooLarge(plan.name, size, budget_bytes)))
        if size <= left:
            loaded.add(plan.config)
            left -= size
    return {
        name: replace(
            plan,
            preload=plan.config in loaded,
            keep_alive_s=_keep_alive_s(drafts[plan.name].model, preload=plan.config in loaded),
        )
        for name, plan in plans.items()
    }


def _keep_alive_s(model: ModelSettings, *, preload: bool) -> float | None:
    if model.keep_alive is not None:
        return seconds(model.keep_alive)
    return None if preload else KEEP_ALIVE_S


def _adapter(entry: str | Adapter, base: Path, store: Store) -> tuple[Path, float]:
    """The adapter as a GGUF file and its scale; a PEFT folder is converted once and kept."""
    wanted = Adapter(path=entry) if isinstance(entry, str) else entry
    path = store.resolve_adapter(wanted.path)
    if path.is_file() and path.suffix == ".gguf":
        read_header(path).require("adapter")
        return path, wanted.scale
    files = [*sorted(each for each in path.rglob("*") if each.is_file()), base]
    out = store.root / "tmp" / "adapters" / f"{_fingerprint(files)}.gguf"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        convert_adapter(path, read_header(base), out)
    return out, wanted.scale


def _fingerprint(files: Sequence[Path], *others: object) -> str:
    """Changes when a file does, by its size and time, or anything else that is given."""
    marks = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr((marks, others)).encode()).hexdigest()[:32]


def _library() -> str:
    """Its saved states are read by the same one only (engine/loading.py)."""
    return version("llama-cpp-python")


def control_tokens(header: Header) -> re.Pattern[str] | None:
    """A pattern of every control token's text; None when the vocabulary has none."""
    metadata = header.metadata
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    texts = [
        str(token) for token, kind in zip(tokens, types, strict=False) if kind == CONTROL_TOKEN and token
    ]
    if not texts:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))
