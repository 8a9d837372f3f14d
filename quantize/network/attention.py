"""Causal attention with rotary positions in torch, as llama.cpp computes it.

Pure functions over (batch, tokens, heads, width) tensors; knows no files and no model.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from quantize.network.shape import Rotary

YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0  # llama.cpp's own, which no key changes for these families


def rotation(rotary: Rotary, n_tokens: int, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (tokens, n_rot / 2) float64, of positions 0 to n_tokens - 1."""
    pairs = torch.arange(rotary.n_rot // 2, dtype=torch.float64)
    frequencies = rotary.base ** (-2 * pairs / rotary.n_rot)
    if factors is not None:
        frequencies = frequencies / factors.to(torch.float64)
    angles = torch.outer(torch.arange(n_tokens, dtype=torch.float64), frequencies)
    turned = angles * rotary.scale
    if rotary.yarn:
        keep = _yarn_ramp(rotary, pairs)
        turned = turned * (1 - keep) + angles * keep
    return turned.cos() * rotary.magnitude, turned.sin() * rotary.magnitude


def _yarn_ramp(rotary: Rotary, pairs: Tensor) -> Tensor:
    """1 for short waves, which keep their frequency, 0 for long ones, which are stretched."""

    def dimension(turns: float) -> float:
        waves = math.log(rotary.n_ctx_original / (turns * 2 * math.pi))
        return rotary.n_rot * waves / (2 * math.log(rotary.base))

    low = max(0.0, math.floor(dimension(YARN_BETA_FAST)))
    high = min(rotary.n_rot - 1.0, math.ceil(dimension(YARN_BETA_SLOW)))
    return 1 - ((pairs - low) / max(0.001, high - low)).clamp(0, 1)


def rotate(x: Tensor, cosines: Tensor, sines: Tensor, *, interleaved: bool) -> Tensor:
    """Turn the first n_rot elements of every head of `x` (batch, tokens, heads, width).

    `interleaved`: pairs are neighbours; else an element's partner is n_rot / 2 further.
    """
    half = cosines.shape[-1]
    cos, sin = cosines[:, None].to(x.dtype), sines[:, None].to(x.dtype)  # (tokens, 1, n_rot / 2)
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turning.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)
    else:
        first, second = turning.split(half, -1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


def attend(q: Tensor, k: Tensor, v: Tensor, *, scale: float, window: int | None = None) -> Tensor:
    """Causal attention of (batch, tokens, heads, width) queries; fewer key heads serve several query heads.

    `window`: how many tokens a token sees, itself included. Returns (batch, tokens, heads * width).
    """
    shared = q.shape[2] // k.shape[2]
    if shared > 1:
        k, v = (part.repeat_interleave(shared, dim=2) for part in (k, v))
    n_tokens = q.shape[1]
    mask = None
    if window is not None and window < n_tokens:
        distance = torch.arange(n_tokens)[:, None] - torch.arange(n_tokens)
        mask = ((distance >= 0) & (distance < window)).to(q.device)
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    seen = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale)
    return seen.transpose(1, 2).flatten(2)
