"""How much each layer turns what passes through it: a first guess at which layers matter least.

Block influence (Men et al., ShortGPT, 2024): 1 - cos(what goes in, what comes out), averaged over tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

from quantize.network.network import Network
from quantize.network.stream import blocks


def block_influences(network: Network, windows: np.ndarray, layers: Sequence[int]) -> list[float]:
    """One value a layer of `layers`, which are run one after the other as if the model had no others.

    `windows`: (windows, tokens) ids. 0 is a layer that only stretches what it gets.
    """
    found = []
    with torch.no_grad():
        hidden = network.embed(torch.from_numpy(windows).to(network.device))
        for index in layers:
            layer, total = network.layer(index), 0.0
            for part in blocks(*windows.shape):
                after = layer(hidden[part])
                total += float(torch.cosine_similarity(hidden[part], after, dim=-1).double().sum())
                hidden[part] = after
            found.append(1 - total / windows.size)
    return found
