"""Whether two models are one function: their predictions over a few tokens, compared in torch.

One layer of each is in memory at a time. Knows nothing of what was changed.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from quantize.errors import QuantizeError
from quantize.network.network import Network

#: Nats that no position may differ by; float32 alone stays below 1e-6.
MAX_KL = 1e-4
CHECKED_TOKENS = 256


class NotExact(QuantizeError):
    """A change that changed the function."""

    def __init__(self, name: str, kl: float) -> None:
        super().__init__(
            f"the transform {name} is not exact for this model: predictions differ by up to {kl:.3g} nats "
            f"before any rounding (at most {MAX_KL:g}); leave it out"
        )


def largest_kl(source: Path, changed: Path, tokens: Sequence[int]) -> float:
    """The largest KL(source || changed), nats, over the positions of one sequence, in float32."""
    reference, candidate = (_log_probabilities(path, tokens) for path in (source, changed))
    kl = (reference.exp() * (reference - candidate)).sum(-1)
    return float(kl.max()) if bool(kl.isfinite().all()) else float("inf")


def check_exact(name: str, source: Path, changed: Path, tokens: Sequence[int]) -> float:
    """The same over at most CHECKED_TOKENS; raises NotExact where it is above MAX_KL."""
    kl = largest_kl(source, changed, tokens[:CHECKED_TOKENS])
    if not kl < MAX_KL:
        raise NotExact(name, kl)
    return kl


def _log_probabilities(path: Path, tokens: Sequence[int]) -> torch.Tensor:
    """(tokens, n_vocab) float64."""
    model = Network.open(path)
    with torch.no_grad():
        logits = model.head(model.forward(torch.tensor([list(tokens)])))[0]
    return logits.double().log_softmax(-1)
