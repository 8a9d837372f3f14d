"""How many layers of a model go to the GPU and what type its cells are, where the operator does not say.

Layers come first: a model that is wholly on the GPU is several times as fast as one that is partly there.
Then f16 cells: our fast attention on the CPU reads no others (engine/kernels). Arithmetic; opens nothing.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from engine.request import MAX_SEQUENCES, KVType
from models.footprint import Footprint
from models.placement import Bytes
from server import shape

Types = tuple[KVType, KVType]  # of keys, of values
Cost = Callable[[int, int, Types, int], Footprint]  # (n_cells, n_parallel, types, gpu_layers)


@dataclass(frozen=True, slots=True)
class Placing:
    """What was found, and why the cells are of that type; `least`: cells that are there for the taking."""

    gpu_layers: int
    types: Types
    why: str
    least: int = shape.LEAST_N_CTX


@dataclass(frozen=True, slots=True)
class Wish:
    """What a model would have; the operator's numbers are never changed."""

    cost: Cost
    n_layers: int  # that a GPU could take; 0 without one
    gpu_layers: int | None = None
    type_k: KVType | None = None
    type_v: KVType | None = None
    can_quantize: bool = True
    n_ctx: int | None = None
    n_ctx_train: int | None = None
    n_parallel: int | None = None
    kv_cells: int | None = None

    @property
    def wanted(self) -> int:
        """Cells that were given, or that hold all the context that the model was trained on."""
        longest = self.n_ctx or self.n_ctx_train or shape.UNKNOWN_N_CTX
        if self.kv_cells is None:
            return longest
        return min(self.kv_cells, longest * (self.n_parallel or MAX_SEQUENCES))  # more could never be used

    @property
    def enough(self) -> int:
        """Cells with which the model is worth serving."""
        return self.wanted if self.is_given else min(self.wanted, shape.CELLS_EACH)

    @property
    def is_given(self) -> bool:
        """Whether the operator said how much context there is to be."""
        return self.n_ctx is not None or self.kv_cells is not None

    @property
    def _is_free(self) -> bool:
        """Whether the number of layers is ours to choose."""
        return self.n_layers > 0 and self.gpu_layers is None

    @property
    def _layers(self) -> int:
        return self.n_layers if self.gpu_layers is None else min(self.gpu_layers, self.n_layers)

    def place(self, room: Bytes) -> Placing | None:
        """The best of what fits into the room with enough context; None where nothing does."""
        share = 1.0 if self.is_given else shape.CONTEXT_SHARE
        exact, small = self.types("f16"), self.types("q8_0")
        held = max(0, self._fitting(exact, self._layers, room, share))
        if held >= self.wanted:
            return Placing(self._layers, exact, "all of the context fits", self.wanted)
        if small != exact and self._fitting(small, self._layers, room, share) >= self.wanted:
            why = f"f16 would hold {held} tokens of {self.wanted}"
            return Placing(self._layers, small, why, self.wanted)
        share = 1.0 if self._is_free else share
        for types, layers in self._shorter(room):
            if self._fitting(types, layers, room, share) >= self.enough:
                least = self.enough if self._is_free else shape.LEAST_N_CTX
                return Placing(layers, types, self._reason(types, held), least)
        return None

    def fallback(self, room: Bytes) -> Placing:
        """For a room that does not hold enough of it: as small as it gets."""
        small = self.types("q4_0" if self.is_given else "q8_0")
        layers = self._most_layers(small, room) if self._is_free else self._layers
        return Placing(layers, small, "memory is short")

    def types(self, chosen: KVType) -> Types:
        """Types of keys and values, where the operator's come first."""
        chosen = chosen if self.can_quantize else "f16"
        return self.type_k or chosen, self.type_v or chosen

    def _shorter(self, room: Bytes) -> Iterator[tuple[Types, int]]:
        """Types and layers to try where not all of the context fits beside all of the layers, best first."""
        kinds: list[KVType] = ["f16", "q8_0"]
        if self._is_free:
            yield from [(self.types(kind), self._layers) for kind in kinds]
        if self.is_given:
            kinds.append("q4_0")
        for kind in kinds:
            types = self.types(kind)
            yield types, self._most_layers(types, room) if self._is_free else self._layers

    def _reason(self, types: Types, held: int) -> str:
        if types != self.types("f16"):
            return f"f16 would hold {held} tokens of {self.enough}"
        return "all of the context fits" if self.is_given else "smaller ones would not hold all of it either"

    def _fitting(self, types: Types, layers: int, room: Bytes, share: float) -> int:
        def cost(n_cells: int, n_parallel: int) -> Footprint:
            return self.cost(n_cells, n_parallel, types, layers)

        return shape.fitting(cost, self.n_parallel or shape.PARALLEL_CPU, room, share=share)

    def _most_layers(self, types: Types, room: Bytes) -> int:
        def device_bytes(layers: int) -> int:
            n_parallel = self.n_parallel or shape.PARALLEL_CPU
            return self.cost(self.enough, n_parallel, types, layers).device_bytes

        return most_layers(device_bytes, self.n_layers, room.device)


def most_layers(device_bytes: Callable[[int], int], n_layers: int, room_bytes: int) -> int:
    """As many layers as fit; what they take never falls, but that all together need nothing of the host."""
    if device_bytes(n_layers) <= room_bytes:
        return n_layers
    return bisect_right(range(1, n_layers), room_bytes, key=device_bytes)
