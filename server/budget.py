"""What engines may take of this machine: its share for models, less what the embedder takes beside them."""

from models.errors import ModelsError
from models.placement import Bytes
from models.store import Store
from server import embedding
from server.machine import Machine, torch_for_cuda
from server.settings import Settings


def budget(settings: Settings, store: Store, machine: Machine) -> Bytes:
    """What all engines together may take."""
    server = settings.server
    whole = machine.budget(server.memory_budget_mb, server.gpu_memory_budget_mb)
    left = whole - embedder_bytes(settings, store, machine)
    return Bytes(max(0, left.host), max(0, left.device))


def embedder_bytes(settings: Settings, store: Store, machine: Machine) -> Bytes:
    """What the embedder takes in the server's process; nothing where it is not in the store."""
    try:
        folder = store.resolve_embedder(settings.embedder.model)
    except ModelsError:  # told by whoever opens it
        return Bytes(0)
    return embedding.memory(folder, on_gpu=machine.on_gpu and torch_for_cuda())
