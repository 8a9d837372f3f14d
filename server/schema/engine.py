"""GET /v1/engine: what every engine is, gets and does now."""

from typing import Any, Literal

import msgspec


class Memory(msgspec.Struct, kw_only=True):
    """Estimated bytes, told from the file's header before it is loaded."""

    weights_bytes: int
    kv_bytes: int
    compute_bytes: int  # the process and what it computes in, at most
    cache_bytes: int  # prefixes kept beside the KV cache, at most
    total_bytes: int
    gpu_bytes: int  # of the total, what lies in the GPU's own memory


class EngineState(msgspec.Struct, kw_only=True):
    """One process with one model; several names may share it."""

    id: str
    object: Literal["engine"] = "engine"
    models: list[str]  # models and assistants that it answers for
    state: Literal["unloaded", "loading", "ready", "failed", "down", "closing"]
    problem: str | None  # why it did not load the last time
    n_ctx: int  # tokens of one request, answer included
    n_ctx_train: int | None
    n_parallel: int  # requests decoded together
    kv_cells: int  # tokens of all requests together; 0 for models that write no text
    n_threads: int | None  # null: not loaded yet
    gpu: str | None  # device; null: the CPU, or not loaded yet
    n_layers: int  # that a GPU can take, the output head being one
    n_gpu_layers: int | None  # of them, on the GPU; null: not loaded yet, and not chosen before
    kv_type_k: str  # of keys
    kv_type_v: str  # of values
    kv_type_reason: str | None  # why, where it was chosen; null: as configured
    slow_attention: str | None  # why the CPU runs llama.cpp's own attention; null: it runs lq's kernel
    memory: Memory
    leases: int  # requests that hold it
    waiting: int  # requests that wait for it to load; those that wait in it are in `stats`
    idle_s: float | None  # null: in use or not loaded
    keep_alive_s: float | None  # null: stays until another model needs its room
    preload: bool
    config: dict[str, Any]  # everything that it is started with
    stats: dict[str, Any] | None  # the engine's own figures; null when it does not answer


class EngineList(msgspec.Struct, kw_only=True):
    """All engines, and the memory that they share."""

    object: Literal["list"] = "list"
    data: list[EngineState]
    memory_budget_bytes: int  # of the host; engines end, longest unused first, before they take more together
    memory_held_bytes: int
    gpu_memory_budget_bytes: int  # the same of the GPU's own memory; 0 without a GPU
    gpu_memory_held_bytes: int
