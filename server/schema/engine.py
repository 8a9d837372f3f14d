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


class Slot(msgspec.Struct, kw_only=True):
    """A place for one request, and what the request in it does; never what is in it, or whose it is."""

    # prompt: it is read; following: another request reads the part that both begin with, and this one waits.
    state: Literal["idle", "prompt", "writing", "following"]
    n_tokens: int  # computed, that the slot holds
    n_cached_tokens: int  # of the request's prompt, found in the cache
    adapters: dict[str, float]  # of the request: their scales by name
    age_s: float | None  # since the request was first let in; null: idle


class HitRates(msgspec.Struct, kw_only=True):
    """Shares of the prompt tokens of all requests that have ended; null before there were any."""

    all: float | None
    slot: float | None  # in the KV cache
    ram: float | None  # kept in host memory
    disk: float | None


class LoadedAdapter(msgspec.Struct, kw_only=True):
    """A LoRA adapter beside the model."""

    name: str
    default_scales: dict[str, float]  # by the name that a client asks for
    running: int | None  # requests that run with it; null: the engine has not told


class Features(msgspec.Struct, kw_only=True):
    """What a loaded engine can do, and does."""

    unified: bool  # one KV cache that all requests share; else each has a stream of its own
    prefix_sharing: bool  # whether a request can begin with what another one computed
    guesses: Literal["off", "lookup", "lookup and draft model"]  # of the next tokens, where they pay
    guessing: bool | None  # whether the last call that could hold guesses did; null: the engine has not told
    acceptance: float | None  # share of the guesses that were right; null before there were any
    flash_attention: bool | None  # null: llama.cpp did not say
    kernels: list[str]  # of lq's own that the CPU computes with: attention, weights
    gpu: str | None  # null: all runs on the CPU


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
    features: Features | None  # null: not loaded
    adapters: list[LoadedAdapter]
    # What the engine told of itself last; null when it is not loaded or has not told anything yet.
    stats_age_s: float | None  # an engine in a long call answers after it: what it told may be older
    slots: list[Slot] | None
    queue: (
        dict[str, int] | None
    )  # requests that wait in the engine, by their keys' priority, the highest first
    hit_rates: HitRates | None
    stats: dict[str, Any] | None  # all other figures


class EngineList(msgspec.Struct, kw_only=True):
    """All engines, and the memory that they share."""

    object: Literal["list"] = "list"
    data: list[EngineState]
    memory_budget_bytes: int  # of the host; engines end, longest unused first, before they take more together
    memory_held_bytes: int
    gpu_memory_budget_bytes: int  # the same of the GPU's own memory; 0 without a GPU
    gpu_memory_held_bytes: int
