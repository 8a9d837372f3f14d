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
from models import placement
from models.footprint import DEVICE_BYTES, PROCESS_BYTES, Footprint, can_quantize, footprint, pieces_of
from models.gguf import Header, read_header
from models.lora_gguf import convert_adapter
from models.placement import Bytes
from models.store import Store
from server import placing, pooled, shape
from server.budget import budget
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
    n_layers: int = 0  # that a GPU could take, the output head being one
    why_cells: str = ""  # why keys and values are of their type; "": as the operator said


def plan(settings: Settings, store: Store, machine: Machine | None = None) -> dict[str, Plan]:
    """A plan for every model and assistant by its name; those that can share an engine have equal configs.

    Raises SettingsError for a model that is to be loaded at start and is too large for this machine.
    """
    machine = machine or this_machine()
    whole = budget(settings, store, machine)
    drafts = _drafts(settings, store)
    distinct = list({draft.key: draft for draft in drafts.values()}.values())
    bases = [draft.base(machine, whole) for draft in distinct]
    rooms = dict(zip([draft.key for draft in distinct], shape.rooms(bases, whole), strict=True))
    plans = {name: draft.plan(rooms[draft.key], whole, machine) for name, draft in drafts.items()}
    return _timed(plans, drafts, whole)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A model with its adapters, found and read; what it gets of the machine is open yet."""

    name: str
    model: ModelSettings
    pieces: tuple[Header, ...]
    drafter: tuple[Header, ...]  # of the small model that drafts tokens, if any
    lora: tuple[tuple[Path, float], ...]
    adapters: Mapping[str, tuple[Path, float]]  # by name
    cache_root: Path  # of all models
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

    def cost(
        self,
        n_cells: int,
        n_parallel: int,
        types: placing.Types = ("f16", "f16"),
        gpu_layers: int = 0,
        *,
        n_drafted: int | None = None,
    ) -> Footprint:
        """What it takes with so many cells for so many sequences; `n_drafted`: cells of the draft model."""
        if self.kind != "text":
            return pooled.cost(self.pieces, n_cells, n_parallel, gpu_layers)
        own = footprint(
            self.pieces, n_cells=n_cells, n_parallel=n_parallel, type_k=types[0], type_v=types[1],
            gpu_layers=gpu_layers,
        )  # fmt: skip
        adapters = sum(path.stat().st_size for path, _ in [*self.lora, *self.adapters.values()])
        layers = placement.n_layers(self.pieces[0])
        device = own.device_bytes + adapters * min(gpu_layers, layers) // layers
        weights, kv, compute = own.weights_bytes + adapters, own.kv_bytes, own.compute_bytes
        if self.drafter and self.model.speculation != "off":
            draft = self._drafter_cost(n_drafted or n_cells, n_parallel, gpu_layers)
            weights, kv = weights + draft.weights_bytes, kv + draft.kv_bytes
            compute, device = compute + draft.compute_bytes, device + draft.device_bytes
        return Footprint(weights, kv, compute, self.model.cache_ram_mb * 2**20, device)

    def _drafter_cost(self, n_cells: int, n_parallel: int, gpu_layers: int) -> Footprint:
        """Of the draft model, which runs in the same process and sees the same number of layers."""
        found = footprint(self.drafter, n_cells=n_cells, n_parallel=n_parallel, gpu_layers=gpu_layers)
        shared = DEVICE_BYTES if gpu_layers else 0
        return replace(
            found,
            compute_bytes=found.compute_bytes - PROCESS_BYTES - shared,
            device_bytes=found.device_bytes - shared,
        )

    def base(self, machine: Machine, budget: Bytes) -> Bytes:
        """What it takes without context, with all the layers on the GPU that may and can go there."""
        given = self.model.gpu_layers
        layers = self.n_layers if given is None else min(given, self.n_layers)
        size = self.cost(0, self.model.n_parallel or 1, gpu_layers=layers if machine.on_gpu else 0).place
        return Bytes(size.host, min(size.device, budget.device)) if given is None else size

    @property
    def n_layers(self) -> int:
        return placement.n_layers(self.pieces[0])

    def plan(self, room: Bytes, budget: Bytes, machine: Machine) -> Plan:
        """What it gets of its room; a context that was given and does not fit there may use all `budget`."""
        if self.kind != "text":
            return self._pooled_plan(room, machine)
        model, facts = self.model, Facts.of(self.pieces)
        wish = self._wish(machine, facts)
        placed = wish.place(room) or (wish.place(budget) if wish.is_given else None) or wish.fallback(room)

        def cost(n_cells: int, n_parallel: int, n_drafted: int | None = None) -> Footprint:
            return self.cost(n_cells, n_parallel, placed.types, placed.gpu_layers, n_drafted=n_drafted)

        chosen = shape.choose(
            cost, n_ctx_train=facts.n_ctx_train, room=room, n_cores=machine.n_cores,
            on_gpu=machine.on_gpu and placed.gpu_layers == self.n_layers,
            n_ctx=model.n_ctx, n_parallel=model.n_parallel, kv_cells=model.kv_cells, least=placed.least,
        )  # fmt: skip
        config = self._config(chosen, placed, machine)
        memory = cost(
            chosen.n_cells, chosen.n_parallel, chosen.n_ctx * chosen.n_parallel
        )  # a draft model never shares its cells
        return Plan(
            self.name, config, control_tokens(self.pieces[0]), facts, memory,
            adapter_scales={name: scale for name, (_, scale) in self.adapters.items()},
            n_layers=self.n_layers,
            why_cells=placed.why if "auto" in (model.kv_type_k, model.kv_type_v) else "",
        )  # fmt: skip

    def _wish(self, machine: Machine, facts: Facts) -> placing.Wish:
        model = self.model
        return placing.Wish(
            cost=self.cost,
            n_layers=self.n_layers if machine.on_gpu else 0,
            gpu_layers=model.gpu_layers,
            type_k=None if model.kv_type_k == "auto" else model.kv_type_k,
            type_v=None if model.kv_type_v == "auto" else model.kv_type_v,
            can_quantize=can_quantize(self.pieces[0]),
            n_ctx=model.n_ctx,
            n_ctx_train=facts.n_ctx_train,
            n_parallel=model.n_parallel,
            kv_cells=model.kv_cells,
        )

    def _config(self, chosen: shape.Shape, placed: placing.Placing, machine: Machine) -> EngineConfig:
        model = self.model
        type_k, type_v = placed.types
        gpu_layers = placed.gpu_layers if machine.on_gpu else model.gpu_layers
        config = EngineConfig(
            model_path=self.path,
            n_ctx=chosen.n_ctx,
            n_parallel=chosen.n_parallel,
            kv_cells=None if chosen.n_cells == chosen.n_ctx * chosen.n_parallel else chosen.n_cells,
            n_threads=model.threads,
            n_gpu_layers=gpu_layers,
            use_mmap=model.mmap,
            kv_type_k=type_k,
            kv_type_v=type_v,
            lora=self.lora,
            adapters=tuple(self._adapters),
            max_queue=model.max_queue,
            max_stall_ms=model.max_stall_ms,
            cache_ram_mb=model.cache_ram_mb,
            cache_disk_mb=model.cache_disk_mb,
            cache_folder=self._cache_folder(placed.types, gpu_layers),
            speculation=model.speculation,
            draft_model=self.drafter[0].path if self.drafter else None,
        )
        config.validate()
        return config

    def _pooled_plan(self, room: Bytes, machine: Machine) -> Plan:
        config = pooled.config(
            self.name, self.kind, self.model, self.pieces, room=room, on_gpu=machine.on_gpu
        )
        config.validate()
        layers = config.n_gpu_layers or 0 if machine.on_gpu else 0
        memory = self.cost(config.n_ctx, config.n_parallel, gpu_layers=layers)
        return Plan(self.name, config, None, Facts.of(self.pieces), memory, n_layers=self.n_layers)

    def _cache_folder(self, types: placing.Types, gpu_layers: int | None) -> Path | None:
        """Where its prefixes are kept over restarts: a folder for each thing that they depend on."""
        if not self.model.cache_disk_mb:
            return None
        adapters = [*self.lora, *self.adapters.values()]
        files = [*(piece.path for piece in self.pieces), *(path for path, _ in adapters)]
        model = _fingerprint(files, self.lora, list(self.adapters), _library())
        return self.cache_root / f"{model}-{_fingerprint((), *types, gpu_layers)[:8]}"


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
    return _Draft(
        name=name,
        model=model,
        pieces=pieces,
        drafter=tuple(pieces_of(read_header(drafter).require("model"))) if drafter else (),
        lora=adapters,
        adapters=named,
        cache_root=store.root / "cache" / "prefixes",
        is_assistants=name != model_name,
        kind=kind,
    )


def kind_of(name: str, model: ModelSettings, store: Store) -> Kind:
    """What the model of this name is for, as its file says."""
    header = read_header(store.resolve_model(model.model or name)).require("model")
    return pooled.kind_of(header, model)


def _timed(plans: dict[str, Plan], drafts: Mapping[str, _Draft], budget: Bytes) -> dict[str, Plan]:
    """The same with what is loaded at start and how long each stays.

    Of those to be loaded at start, as many as fit together, in the order of the settings.
    """
    is_only = len({plan.config for plan in plans.values()}) == 1
    loaded: set[EngineConfig] = set()
    left = budget
    for plan in plans.values():
        draft = drafts[plan.name]
        wanted = is_only or (bool(draft.model.preload) and not draft.is_assistants)
        if draft.model.preload is False or not wanted or plan.config in loaded:
            continue
        size = plan.footprint.place
        if not size.within(budget):
            raise SettingsError(str(ModelTooLarge(plan.name, size, budget)))
        if size.within(left):
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
