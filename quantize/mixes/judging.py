"""Which of several files is closer to their source, told by a few thousand tokens.

Now and then a token makes the source itself stumble: one number of its hidden state grows a hundredfold, and
what comes after is no prediction. Whether a file stumbles there too is chance, yet its divergence is then a
thousand times that of other tokens, and the mean over 2,000 is of that token alone. So files are compared
piece by piece, and the median piece decides.
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
VERSION = 3


def pieces(kl: np.ndarray) -> list[float]:
    """Means over PIECE tokens or more each of (tokens,) divergences, one at least."""
    capped = np.minimum(kl, MOST_NATS)
    return [float(part.mean()) for part in np.array_split(capped, max(1, len(capped) // PIECE))]


def ratio(judged: Sequence[float], over: Sequence[float]) -> float:
    """Divergence of one file over another's, by the median of the same pieces; below 1 it is closer."""
    mine, others = (np.maximum(np.array(each), LEAST_NATS) for each in (judged, over))
    return float(np.median(mine / others))
