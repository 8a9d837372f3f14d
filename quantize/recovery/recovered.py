"""What a recovery found out, as a record. Knows no torch, so that reports are read quickly."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Recovered:
    """What came of it. Divergences are means in nats over the `n_checked` tokens that were held back,
    computed in float32; `history` has (step, divergence) of every check, the file as it was first."""

    before: float
    after: float
    n_steps: int
    best_step: int
    n_trained: int  # tokens of the windows trained on
    n_checked: int
    n_norms: int  # numbers that were trained
    n_scales: int
    history: tuple[tuple[int, float], ...]

    @property
    def helped(self) -> bool:
        """Whether the file was changed."""
        return self.after < self.before
