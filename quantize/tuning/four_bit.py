"""Linear layers whose frozen weight lies in 4 bits: NF4 in blocks of 64, 4.25 bits a weight.

QLoRA (Dettmers et al., 2023) trains an adapter beside such weights. They are expanded for each product and
again for its gradient, so that nothing of the expanded weight is kept between the two.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCK = 64
#: The quantiles of a normal distribution, scaled to -1 … 1, zero among them (QLoRA, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


class FourBitLinear(nn.Linear):
    """A drop-in for a frozen nn.Linear; `weight` is the expanded weight, in `dtype`, made on each access."""

    codes: Tensor  # uint8 (ceil(out * in / 64) * 32,): two weights a byte, the first in the high half
    scales: Tensor  # float16, one a block

    def __init__(self, linear: nn.Linear, *, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = dtype
        codes, scales = pack(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        bias = linear.bias
        self.register_parameter(
            "bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        )

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(out, in), expanded."""
        return unpack(self.codes, self.scales, (self.out_features, self.in_features), self.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """As nn.Linear's."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        return _Product.apply(input.to(self.dtype), self, bias)


class _Product(torch.autograd.Function):
    """x W^T + b; the gradient is for x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FourBitLinear, bias: Tensor | None) -> Tensor:
        ctx.layer = layer
        return functional.linear(x, layer.weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.layer.weight.to(grads[0].dtype), None, None


def pack(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of any weight: each number becomes the nearest level of its block."""
    flat = weight.float().flatten()
    blocks = functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1).clamp(min=torch.finfo(torch.float16).tiny).half()
    levels = torch.tensor(NF4, device=flat.device)
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.float()[:, None], borders).to(torch.uint8).view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def unpack(codes: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weight that codes and scales stand for."""
    pairs = _pairs(dtype, codes.device)
    blocks = functional.embedding(codes.int(), pairs).view(-1, BLOCK) * scales.to(dtype)[:, None]
    return blocks.flatten()[: shape[0] * shape[1]].view(shape)


_tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """(256, 2): both numbers of each byte."""
    if (dtype, device) not in _tables:
        levels = torch.tensor(NF4, device=device)
        both = torch.cartesian_prod(levels, levels)
        _tables[dtype, device] = both.to(dtype)
    return _tables[dtype, device]


def replace_linears(model: nn.Module, names: list[str], *, dtype: torch.dtype) -> None:
    """Put these linear layers into 4 bits, one after the other, each freed when it is replaced."""
    for name in names:
        parent, _, last = name.rpartition(".")
        holder = model.get_submodule(parent)
        linear = getattr(holder, last)
        setattr(holder, last, FourBitLinear(linear, dtype=dtype))
