"""Embedding and reranking models: told from a GGUF's header, and what their engine gets of the machine."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from engine.request import EngineConfig, Kind
from models import placement
from models.footprint import Footprint, footprint
from models.gguf import Header, InvalidGGUF
from models.placement import Bytes
from server.model_settings import Model as ModelSettings
from server.placing import most_layers
from server.settings import SettingsError

RANK = 4  # {arch}.pooling_type, as llama.cpp numbers them; 0: none
EMBEDDING = frozenset({1, 2, 3})
#: Tokens of one text where neither the operator nor the file says otherwise. llama.cpp keeps room for a
#: number for each token of the vocabulary and each token of a call: 2 GB at 2,048 tokens of 250,000.
N_CTX = 2048
LEAST_N_CTX = 256
UNKNOWN_N_CTX = 512
#: Tokens and texts of one call. Attention looks at all pairs of a call's tokens, whosever they are: on a CPU
#: shorter calls are faster where they change anything (docs/log.md), and let others in sooner.
N_BATCH = 512
N_BATCH_CPU = 256
N_PARALLEL = 64
#: Of the room that is there, a call takes so much of its own accord.
SHARE = 0.5
#: What makes no sense of a model that writes nothing.
TEXT_OPTIONS = (
    "lora", "adapters", "draft_model", "speculation", "kv_cells", "kv_type_k", "kv_type_v", "max_stall_ms",
    "cache_ram_mb", "cache_disk_mb",
)  # fmt: skip


def kind_of(header: Header, model: ModelSettings) -> Kind:
    """What a model is for, as its file says; `pooling` makes an embedding model of any that does not rank."""
    pooling = header.hyperparameter("pooling_type")
    if pooling == RANK:
        if not any(tensor.name.startswith("cls.") for tensor in header.tensors):
            raise InvalidGGUF(
                header.path,
                "its pooling_type says that it ranks documents, and it has no classifier to score them",
                remedy="convert the model again, or fetch another conversion",
            )
        return "rerank"
    return "embedding" if model.pooling or pooling in EMBEDDING else "text"


def check(name: str, kind: Kind, model: ModelSettings) -> None:
    """Raise SettingsError for an option that the model would ignore."""
    plain = ModelSettings()
    for option in TEXT_OPTIONS:
        if getattr(model, option) != getattr(plain, option):
            does = "ranks documents" if kind == "rerank" else "embeds texts"
            problem = f"it {does}; `{option}` is for models that write text: leave it out"
            raise SettingsError(f"models.{name}: {problem}")
    if model.pooling and kind == "rerank":
        problem = "it ranks documents; `pooling` is for embedding models: leave it out"
        raise SettingsError(f"models.{name}: {problem}")


def config(
    name: str, kind: Kind, model: ModelSettings, pieces: Sequence[Header], *, room: Bytes, on_gpu: bool
) -> EngineConfig:
    """What its engine is started with; the longest text is chosen from file and memory unless it is given."""
    path: Path = pieces[0].path
    trained = pieces[0].n_ctx_train or UNKNOWN_N_CTX
    if model.n_ctx and model.n_ctx > trained:
        raise SettingsError(
            f"models.{name}: n_ctx is {model.n_ctx}, and this model reads texts of {trained} tokens at most"
        )
    n_parallel = model.n_parallel or N_PARALLEL
    n_ctx = model.n_ctx or min(trained, N_CTX)
    layers = _gpu_layers(pieces, model, n_parallel, room) if on_gpu else 0
    while not model.n_ctx and n_ctx > LEAST_N_CTX and not _fits(pieces, n_ctx, n_parallel, layers, room):
        n_ctx = max(LEAST_N_CTX, n_ctx // 2)
    return EngineConfig(
        model_path=path,
        kind=kind,
        pooling=model.pooling,
        n_ctx=n_ctx,
        n_parallel=n_parallel,
        n_batch=N_BATCH if on_gpu else N_BATCH_CPU,
        n_threads=model.threads,
        n_gpu_layers=layers if on_gpu else model.gpu_layers,
        use_mmap=model.mmap,
        max_queue=model.max_queue,
        cache_ram_mb=0,
        speculation="off",
    )


def cost(pieces: Sequence[Header], n_ctx: int, n_parallel: int, gpu_layers: int = 0) -> Footprint:
    """What an engine takes that reads texts of so many tokens, at most."""
    room = max(n_ctx, N_BATCH, n_parallel)
    is_encoder = pieces[0].is_encoder
    found = footprint(
        pieces, n_cells=0 if is_encoder else room, n_parallel=room if is_encoder else n_parallel,
        n_batch=room, gpu_layers=gpu_layers,
    )  # fmt: skip
    mask = 6 * room * room  # in float32, and once more in 16 bits
    on_gpu = mask if gpu_layers else 0
    return replace(
        found,
        compute_bytes=found.compute_bytes + mask + on_gpu,
        device_bytes=found.device_bytes + on_gpu,
    )


def _gpu_layers(pieces: Sequence[Header], model: ModelSettings, n_parallel: int, room: Bytes) -> int:
    """Those given, or as many as fit beside the shortest call."""
    n_layers = placement.n_layers(pieces[0])
    if model.gpu_layers is not None:
        return min(model.gpu_layers, n_layers)

    def device_bytes(layers: int) -> int:
        return cost(pieces, model.n_ctx or LEAST_N_CTX, n_parallel, layers).device_bytes

    return most_layers(device_bytes, n_layers, room.device)


def _fits(pieces: Sequence[Header], n_ctx: int, n_parallel: int, gpu_layers: int, room: Bytes) -> bool:
    taken = cost(pieces, n_ctx, n_parallel, gpu_layers).place
    weights = placement.weights(pieces, gpu_layers)
    free, used = room - weights, taken - weights
    return used.host <= SHARE * free.host and (not gpu_layers or used.device <= SHARE * free.device)
