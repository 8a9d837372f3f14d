"""A decoder in torch, computed from a GGUF under its own tensor names, one layer at a time or whole.

Differentiable in weights and inputs; any weight can be replaced by another tensor. The families are those of
`quantize.families`; llama.cpp's graphs are the truth that tests compare with. Owns no texts and no losses.
"""

from collections.abc import Callable, Container, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from quantize.network.attention import attend, rotate, rotation
from quantize.network.shape import LAYER_WEIGHTS, Rotary, Shape, read_shape
from quantize.network.weights import WeightFile

EMBEDDING, OUTPUT, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
#: Gets every product with a weight: its name, the input (batch, tokens, in), the output (batch, tokens, out).
Tap = Callable[[str, Tensor, Tensor], None]
#: Parts whose output is added to the hidden states, unless one of these norms comes before that.
ADDED = ("attn_output", "ffn_down")
POST_NORMS = ("post_attention_norm", "post_ffw_norm")


class Stage(NamedTuple):
    """Where a layer is about to multiply with weights: the input (batch, tokens, n) that all of `names` read,
    and the hidden states (batch, tokens, n_embd) so far. At its end there are no names, and both are the
    layer's output."""

    names: tuple[str, ...]
    inputs: Tensor
    hidden: Tensor


#: Stops before the products of each input, goes on with the weights that the layer has then, and returns what
#: a part of it puts out.
_Staged = Generator[Stage, None, Tensor]


def lookups(names: Container[str]) -> frozenset[str]:
    """Of these tensors those that nothing is multiplied with: the embedding, unless it is the head too."""
    return frozenset({EMBEDDING}) if OUTPUT in names else frozenset()


class Network:
    """A model whose weights are read when a layer is asked for; `keep` holds them from then on.

    `replaced` holds tensors by name that stand in for the file's; it may be changed at any time.
    """

    def __init__(
        self, file: WeightFile, shape: Shape, *, dtype: torch.dtype, device: str, keep: bool
    ) -> None:
        self.file, self.shape = file, shape
        self.dtype, self.device = dtype, device
        self.replaced: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] | None = {} if keep else None
        self._rotations: dict[tuple[Rotary, int], tuple[Tensor, Tensor]] = {}

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        keep: bool = False,
        n_ctx: int | None = None,
    ) -> "Network":
        """Open a GGUF; raises UnsupportedNetwork, by name, for a model of another family.

        `n_ctx`: as `quantize.network.shape.read_shape` takes it.
        """
        file = WeightFile.open(path)
        return cls(file, read_shape(file.header, n_ctx=n_ctx), dtype=dtype, device=device, keep=keep)

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is the output head too."""
        return OUTPUT not in self.file

    @property
    def head_name(self) -> str:
        """The tensor that makes logits."""
        return EMBEDDING if self.is_tied else OUTPUT

    @property
    def matrices(self) -> list[str]:
        """Names of the weights of two dimensions, embedding and head included, in the file's order."""
        return [name for name in self.file if len(self.file.shape(name)) == 2]

    def weight(self, name: str) -> Tensor:
        """A weight: its replacement, or the file's. With `keep` it is read once."""
        if name in self.replaced:
            return self.replaced[name]
        if self._kept is None:
            return self.file.read(name, self.dtype, self.device)
        if name not in self._kept:
            self._kept[name] = self.file.read(name, self.dtype, self.device)
        return self._kept[name]

    def embed(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, n_embd) of (batch, tokens) ids."""
        return functional.embedding(tokens, self.weight(EMBEDDING)) * self.shape.embedding_scale

    def layer(self, index: int) -> "Layer":
        """A layer with its weights loaded; they live as long as it does."""
        names = [f"blk.{index}.{part}.{kind}" for part in LAYER_WEIGHTS for kind in ("weight", "bias")]
        return Layer(self, index, {name: self.weight(name) for name in names if name in self.file})

    def norm(self, hidden: Tensor) -> Tensor:
        """What the head is multiplied with: the last hidden states after the output norm."""
        return rms_norm(hidden, self.weight(OUTPUT_NORM), self.shape.epsilon)

    def logits_of(self, normed: Tensor, tap: Tap | None = None) -> Tensor:
        """(…, n_vocab) logits of what `norm` gave."""
        logits = functional.linear(normed, self.weight(self.head_name))
        if tap is not None:
            tap(self.head_name, normed, logits)
        if "output.bias" in self.file:
            logits = logits + self.weight("output.bias")
        cap = self.shape.logit_cap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of the last layer's output."""
        return self.logits_of(self.norm(hidden))

    def forward(self, tokens: Tensor, tap: Tap | None = None) -> Tensor:
        """(batch, tokens, n_embd): the last layer's output, for `head`. A row is one sequence."""
        hidden = self.embed(tokens)
        for index in range(self.shape.n_layer):
            hidden = self.layer(index)(hidden, tap)
        return hidden

    def rotation(self, index: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a layer, in the network's dtype."""
        rotary = self.shape.rotaries[index]
        if (rotary, n_tokens) not in self._rotations:
            factors = None if rotary.factors is None else self.file.read(rotary.factors)
            tables = rotation(rotary, n_tokens, factors)
            cos, sin = (table.to(device=self.device, dtype=self.dtype) for table in tables)
            self._rotations[rotary, n_tokens] = cos, sin
        return self._rotations[rotary, n_tokens]


class Layer:
    """One layer. `weights` are by their full names; an entry may be replaced, by one that is trained too."""

    def __init__(self, network: Network, index: int, weights: Mapping[str, Tensor]) -> None:
        self._network, self.index, self.weights = network, index, dict(weights)

    def __call__(self, hidden: Tensor, tap: Tap | None = None) -> Tensor:
        """(batch, tokens, n_embd) in and out; each row is one sequence from its start."""
        for stage in self.stages(hidden, tap):
            hidden = stage.hidden
        return hidden

    def stages(self, hidden: Tensor, tap: Tap | None = None) -> Iterator[Stage]:
        """The same step by step; `weights` may be replaced meanwhile."""
        attended = yield from self._attention(self._norm("attn_norm", hidden), hidden, tap)
        hidden = hidden + self._norm("post_attention_norm", attended)
        fed = yield from self._feed_forward(self._norm("ffn_norm", hidden), hidden, tap)
        hidden = hidden + self._norm("post_ffw_norm", fed)
        yield Stage((), hidden, hidden)

    def adds(self, name: str) -> bool:
        """Whether the output of this product is added to the hidden states as it is."""
        normed = any(self._name(f"{norm}.weight") in self.weights for norm in POST_NORMS)
        return name.split(".")[-2] in ADDED and not normed

    def _name(self, part: str) -> str:
        return f"blk.{self.index}.{part}"

    def _norm(self, part: str, x: Tensor) -> Tensor:
        """Normalised; unchanged where the model has no such norm."""
        weight = self.weights.get(self._name(f"{part}.weight"))
        return x if weight is None else rms_norm(x, weight, self._network.shape.epsilon)

    def _products(
        self, parts: Sequence[str], x: Tensor, hidden: Tensor, tap: Tap | None
    ) -> Generator[Stage, None, list[Tensor]]:
        """What the weights of these parts make of one input."""
        names = [self._name(f"{part}.weight") for part in parts]
        yield Stage(tuple(names), x, hidden)
        found = []
        for name, part in zip(names, parts, strict=True):
            bias = self.weights.get(self._name(f"{part}.bias"))
            found.append(functional.linear(x, self.weights[name], bias))
            if tap is not None:
                tap(name, x, found[-1])
        return found

    def _attention(self, x: Tensor, hidden: Tensor, tap: Tap | None) -> _Staged:
        shape = self._network.shape
        if self._name("attn_qkv.weight") in self.weights:
            (fused,) = yield from self._products(["attn_qkv"], x, hidden, tap)
            heads = (shape.n_head, shape.n_head_kv, shape.n_head_kv)
            parts = fused.split([n * shape.head_dim for n in heads], -1)
        else:
            parts = yield from self._products(["attn_q", "attn_k", "attn_v"], x, hidden, tap)
        q, k, v = (part.unflatten(-1, (-1, shape.head_dim)) for part in parts)
        q, k = self._norm("attn_q_norm", q), self._norm("attn_k_norm", k)
        cosines, sines = self._network.rotation(self.index, x.shape[1])
        interleaved = shape.rotaries[self.index].interleaved
        q, k = (rotate(part, cosines, sines, interleaved=interleaved) for part in (q, k))
        seen = attend(q, k, v, scale=shape.attention_scale, window=shape.windows[self.index])
        (attended,) = yield from self._products(["attn_output"], seen, hidden, tap)
        return attended

    def _feed_forward(self, x: Tensor, hidden: Tensor, tap: Tap | None) -> _Staged:
        if self._name("ffn_gate.weight") in self.weights:
            up, gate = yield from self._products(["ffn_up", "ffn_gate"], x, hidden, tap)
        else:  # phi3: both in one tensor, the gate first
            (fused,) = yield from self._products(["ffn_up"], x, hidden, tap)
            gate, up = fused.chunk(2, -1)
        silu = self._network.shape.activation == "silu"
        gated = functional.silu(gate) if silu else functional.gelu(gate, approximate="tanh")
        (fed,) = yield from self._products(["ffn_down"], gated * up, hidden, tap)
        return fed


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / rms(x) * weight over the last axis, in float32 at least."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return scaled.to(x.dtype) * weight
