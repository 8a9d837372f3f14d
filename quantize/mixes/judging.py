"""Which of several files is closer to their source, told by a few thousand tokens.

Now and then a token makes the source itself stumble: one number of its hidden state grows a hundredfold, and
what comes after is no prediction. Whether a file stumbles there too is chance, yet its divergence is then a
thousand times that of other tokens, and the mean over 2,000 is of that token alone. So files are compared
piece by piece, and the middle half of the pieces decides: a kind of text that makes up a third still counts.
"""

from collections.abc import Sequence

import numpy as np

#: Scored tokens of a piece: what stumbles spoils one or two, and pieces are many and still alike.
PIECE = 64
#: What a token counts at most in the figure that is told.
MOST_NATS = 1.0
#: A file that is its source has no divergence to divide by.
LEAST_NATS = 1e-9
#: Changes when files are compared otherwise.
VERSION = 4


def pieces(kl: np.ndarray) -> list[float]:
    """Means over PIECE tokens or more each of (tokens,) divergences, one at least."""
    capped = np.minimum(kl, MOST_NATS)
    return [float(part.mean()) for part in np.array_split(capped, max(1, len(capped) // PIECE))]


def ratio(judged: Sequence[float], over: Sequence[float]) -> float:
    """Divergence of one file over another's on the same pieces; below 1 it is closer. The geometric mean
    without the quarter of the pieces where it is lowest and that where it is highest."""
    logs = np.sort(_logs(judged) - _logs(over))
    cut = len(logs) // 4
    return float(np.exp(logs[cut : len(logs) - cut].mean()))


def typical(judged: Sequence[Sequence[float]]) -> list[float]:
    """Each file's divergence, in nats: the mean of all files, times its ratio to what they have by piece."""
    by_piece = np.exp(np.mean([_logs(each) for each in judged], axis=0))
    return [float(np.mean(judged)) * ratio(each, by_piece.tolist()) for each in judged]


def _logs(judged: Sequence[float]) -> np.ndarray:
    return np.log(np.maximum(np.array(judged), LEAST_NATS))
