"""Which engine processes the settings ask for, and their lives: one a distinct model and set of adapters.

Names are resolved and headers checked before any process starts.
"""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from engine.request import EngineConfig, EngineInfo, EngineStats, Event, GenerationRequest
from models.gguf import read_header
from models.lora_gguf import convert_adapter
from models.store import Store
from server.settings import Adapter, Settings
from server.settings import Model as ModelSettings

#: gguf token types (llama.cpp): control tokens, such as <|im_end|>, must not come out of a user's text.
CONTROL_TOKEN = 3


class Engine(Protocol):
    """What the server asks of an engine (engine.client.Engine is one)."""

    info: EngineInfo

    @property
    def alive(self) -> bool: ...

    @property
    def pid(self) -> int | None: ...

    def submit(self, request: GenerationRequest) -> AsyncIterator[Event]: ...

    async def tokenize(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> Sequence[int]: ...

    async def detokenize(self, tokens: Sequence[int]) -> str: ...

    async def stats(self) -> EngineStats: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Plan:
    """A resolved engine, not started; `control` matches the model's control tokens in a text."""

    name: str
    config: EngineConfig
    control: re.Pattern[str] | None


def plan(settings: Settings, store: Store) -> dict[str, Plan]:
    """A plan for every model and assistant by its name; those that can share an engine have equal configs."""
    plans: dict[str, Plan] = {}
    for name, model in settings.models.items():
        plans[name] = _plan(name, name, model, model.lora, store)
    for name, assistant in settings.assistants.items():
        base = settings.models[assistant.model]
        if assistant.lora:
            plans[name] = _plan(name, assistant.model, base, [*base.lora, *assistant.lora], store)
        else:
            plans[name] = plans[assistant.model]
    return plans


def _plan(
    name: str, model_name: str, model: ModelSettings, lora: Sequence[str | Adapter], store: Store
) -> Plan:
    path = store.resolve_model(model.model or model_name)
    config = EngineConfig(
        model_path=path,
        n_ctx=model.n_ctx,
        n_parallel=model.n_parallel,
        n_threads=model.threads,
        n_gpu_layers=model.gpu_layers,
        use_mmap=model.mmap,
        lora=tuple(_adapter(entry, path, store) for entry in lora),
        max_queue=model.max_queue,
    )
    config.validate()
    return Plan(name, config, control_tokens(path))


def _adapter(entry: str | Adapter, base: Path, store: Store) -> tuple[Path, float]:
    """The adapter as a GGUF file and its scale; a PEFT folder is converted once and kept."""
    wanted = Adapter(path=entry) if isinstance(entry, str) else entry
    path = store.resolve_adapter(wanted.path)
    if path.is_file() and path.suffix == ".gguf":
        read_header(path).require("adapter")
        return path, wanted.scale
    out = store.root / "tmp" / "adapters" / f"{_fingerprint(path, base)}.gguf"
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        convert_adapter(path, read_header(base), out)
    return out, wanted.scale


def _fingerprint(adapter: Path, base: Path) -> str:
    files = [*sorted(path for path in adapter.rglob("*") if path.is_file()), base]
    marks = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(repr(marks).encode()).hexdigest()[:32]


def control_tokens(path: Path) -> re.Pattern[str] | None:
    """A pattern of every control token's text; None when the vocabulary has none."""
    metadata = read_header(path).metadata
    tokens = metadata.get("tokenizer.ggml.tokens", ())
    types = metadata.get("tokenizer.ggml.token_type", ())
    texts = [
        str(token) for token, kind in zip(tokens, types, strict=False) if kind == CONTROL_TOKEN and token
    ]
    if not texts:
        return None
    return re.compile("|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True)))


Start = Callable[[EngineConfig], Awaitable[Engine]]


@asynccontextmanager
async def running(plans: Mapping[str, Plan], start: Start) -> AsyncIterator[dict[EngineConfig, Engine]]:
    """Every distinct engine, started; all are closed at the end, and at once when one cannot start."""
    engines: dict[EngineConfig, Engine] = {}
    try:
        for config in dict.fromkeys(plan.config for plan in plans.values()):
            engines[config] = await start(config)
        yield engines
    finally:
        await asyncio.gather(*(engine.close() for engine in engines.values()), return_exceptions=True)
