"""The output head's part of the backward pass, some rows of the head at a time.

A sample's gradient by its logits is noise u with the covariance diag(p) - p p^T, the Fisher information of
the softmax, independent at every position: u = sqrt(p) e - p <sqrt(p), e> with random signs e. A label drawn
from p gives p - onehot, of the same covariance, but seldom draws what is unlikely and then gives much: signs
estimate the same mean with less variance.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quantize.network.network import Network
from quantize.network.stream import blocks

ROWS = 1024  # of the head, computed at once: what a block of windows needs for them fits the last cache


@dataclass(frozen=True, slots=True)
class Normaliser:
    """Of the softmax at every position: `log_sum` (windows, tokens); `centre` (draws, windows, tokens), the
    <sqrt(p), e> of every draw."""

    log_sum: Tensor
    centre: Tensor


class HeadGradient:
    """Noise gradients of `normed` (windows, tokens, n_embd), the head's inputs at the scored positions."""

    def __init__(self, network: Network, normed: Tensor, *, n_draws: int, seed: int) -> None:
        self.network, self.normed = network, normed
        self.n_draws, self.seed = n_draws, seed
        self.weight = network.weight(network.head_name)
        has_bias = "output.bias" in network.file
        self.bias = network.weight("output.bias") if has_bias else None

    def row_blocks(self) -> Iterator[slice]:
        """The head's rows, a block at a time."""
        for start in range(0, len(self.weight), ROWS):
            yield slice(start, min(start + ROWS, len(self.weight)))

    def windows(self) -> Iterator[slice]:
        """The windows, a block at a time."""
        yield from blocks(*self.normed.shape[:2])

    def normaliser(self) -> Normaliser:
        """Sums over the vocabulary, kept in a running form as in flash attention."""
        top = self.normed.new_full(self.normed.shape[:2], -torch.inf)
        total = torch.zeros_like(top)
        centre = self.normed.new_zeros(self.n_draws, *self.normed.shape[:2])
        for rows in self.row_blocks():
            for part in self.windows():
                logits, _ = self._logits(rows, part)
                new = torch.maximum(top[part], logits.amax(-1))
                shrink = torch.exp(top[part] - new)
                roots = torch.exp((logits - new[..., None]) / 2)
                total[part] = total[part] * shrink + roots.square().sum(-1)
                for draw in range(self.n_draws):
                    signed = (roots * self._signs(rows, part, draw)).sum(-1)
                    centre[draw, part] = centre[draw, part] * shrink.sqrt() + signed
                top[part] = new
        return Normaliser(top + total.log(), centre / total.sqrt())

    def noise(self, rows: slice, part: slice, normaliser: Normaliser) -> tuple[list[Tensor], Tensor]:
        """For every draw the gradient by the head's product, (windows, tokens, rows); and their expected
        squares, (rows,), summed over windows and tokens."""
        logits, slope = self._logits(rows, part)
        roots = logits.sub_(normaliser.log_sum[part][..., None]).div_(2).exp_()
        p = roots.square()
        squares = (p * (1 - p) if slope is None else p * (1 - p) * slope.square()).sum((0, 1))
        draws = []
        for draw in range(self.n_draws):
            # roots * (signs - roots * centre), with as few passes over memory as it takes
            noise = roots * -normaliser.centre[draw, part][..., None]
            noise.add_(self._signs(rows, part, draw)).mul_(roots)
            draws.append(noise if slope is None else noise.mul_(slope))
        return draws, squares

    def _logits(self, rows: slice, part: slice) -> tuple[Tensor, Tensor | None]:
        """Logits, and their derivative by the product where they are capped."""
        bias = None if self.bias is None else self.bias[rows]
        logits = functional.linear(self.normed[part], self.weight[rows], bias)
        cap = self.network.shape.logit_cap
        if cap is None:
            return logits, None
        bounded = torch.tanh(logits / cap)
        return bounded * cap, 1 - bounded.square()

    def _signs(self, rows: slice, part: slice, draw: int) -> Tensor:
        """(windows, tokens, rows) int8 of -1 and 1; the same whenever they are asked for."""
        n_tokens, n_rows = self.normed.shape[1], rows.stop - rows.start
        signs = np.empty((part.stop - part.start, n_tokens * n_rows), np.int8)
        for place, window in enumerate(range(part.start, part.stop)):
            generator = np.random.default_rng((self.seed, draw, window, rows.start))
            bits = np.frombuffer(generator.bytes(n_tokens * n_rows // 8 + 1), np.uint8)
            signs[place] = np.unpackbits(bits, count=n_tokens * n_rows).view(np.int8)
        signs *= 2
        signs -= 1
        return torch.from_numpy(signs).view(-1, n_tokens, n_rows).to(self.normed.device)
