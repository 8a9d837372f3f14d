"""Measure sensitivities: forward through all layers, then backward, one layer in memory at a time.

A layer is recomputed from its kept inputs; gradients by its products are projected onto the rounding errors
of every candidate type and thrown away. What is done survives a kill: the state is saved now and then, and
the pass goes on with the layer that was next.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quantize.errors import QuantizeError
from quantize.network.hessian import Hessians, input_of
from quantize.network.network import EMBEDDING, Network
from quantize.network.stream import LayerInputs, Progress, blocks, digest_of, forward, inputs_for
from quantize.sensitivity.head_gradient import HeadGradient
from quantize.sensitivity.inputs import project_inputs
from quantize.sensitivity.projection import (
    LEAST_TRACED,
    SAMPLED_ROWS,
    TRACED_WEIGHTS,
    Errors,
    RoundingErrors,
    RowSample,
)
from quantize.sensitivity.record import Sensitivities
from quantize.sensitivity.tally import Sums, Tally

SAVE_EVERY_S = 60.0
ERROR_BYTES = 3 * 10**9  # of one layer's rounding errors in float32; more are held as bfloat16
LIKELY_TYPES = 12
#: A head of more weights has a sample of its rows rounded: about as many weights as this and, surely, all
#: rows that the text makes likely, HEAD_ROWS at most.
HEAD_WEIGHTS, HEAD_ROWS = 2**25, 8192
#: What tells which rows stand for large matrices.
ROWS = SAMPLED_ROWS, TRACED_WEIGHTS, LEAST_TRACED, HEAD_WEIGHTS, HEAD_ROWS


class NothingScored(QuantizeError):
    """Windows too short for what is skipped of them."""

    def __init__(self, skip: int, size: int) -> None:
        super().__init__(
            f"skipping {skip} tokens leaves none of a window of {size} to score; make windows longer"
        )


@dataclass(frozen=True, slots=True)
class Sampling:
    """`n_draws` samples a window share its forward pass. Predictions of the first `skip` tokens, which have
    little context, are not scored."""

    n_draws: int = 2
    skip: int = 16
    seed: int = 0


def measure_sensitivities(
    network: Network,
    windows: np.ndarray,
    errors: Errors,
    hessians: Hessians,
    folder: Path,
    *,
    key: str,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
    save_every_s: float = SAVE_EVERY_S,
) -> Sensitivities:
    """Sensitivities over (windows, tokens) ids, by a float32 network; makes what `hessians` lacks on the way.

    `folder` takes what has to lie on disk meanwhile; `key` names what model and candidates these are. A pass
    that was cut off goes on, if model, candidates, windows and sampling are the same. Raises
    BadRounding and NothingScored.
    """
    sampling = sampling or Sampling()
    if sampling.skip >= windows.shape[1]:
        raise NothingScored(sampling.skip, windows.shape[1])
    key = digest_of(key, windows.shape, windows, sampling)
    folder.mkdir(parents=True, exist_ok=True)
    inputs = inputs_for(network, windows, folder, key)
    forward(network, windows, inputs=inputs, hessians=hessians, progress=progress)
    going = Backward(network, windows, errors, hessians=hessians, inputs=inputs, sampling=sampling, key=key)
    stopped = Tally.load(folder, key, network.device)
    if stopped is None:
        Tally.remove(folder)  # of another pass, whose errors must not be taken for this one's
    else:
        going.tally = stopped
    n_layer, saved = network.shape.n_layer, time.monotonic()
    while going.tally.next_layer >= -1:
        going.step()
        if progress is not None:
            progress("measuring sensitivities", n_layer - going.tally.next_layer, n_layer + 2)
        if time.monotonic() - saved >= save_every_s and going.tally.next_layer >= -1:
            going.tally.save(folder)
            saved = time.monotonic()
    made = going.tally.sensitivities(network.matrices, n_scored=windows.shape[1] - sampling.skip)
    Tally.remove(folder)
    inputs.drop_all()
    return made


class Backward:
    """The pass from the head to the embedding; `tally` is all its state."""

    def __init__(
        self,
        network: Network,
        windows: np.ndarray,
        errors: Errors,
        *,
        hessians: Hessians,
        inputs: LayerInputs,
        sampling: Sampling,
        key: str,
    ) -> None:
        self.network, self.windows, self.errors = network, windows, errors
        self.hessians, self.inputs, self.sampling = hessians, inputs, sampling
        shape = (sampling.n_draws, *windows.shape, network.shape.n_embd)
        gradient = torch.zeros(shape, dtype=network.dtype, device=network.device)
        self.tally = Tally(key, network.shape.n_layer, gradient)
        self.touched = np.unique(windows)

    def step(self) -> None:
        """Take the next layer, from the head (n_layer) to the embedding (-1)."""
        layer = self.tally.next_layer
        if layer == self.network.shape.n_layer:
            self._head()
        elif layer >= 0:
            self._layer(layer)
        else:
            self._embedding()
        self.tally.next_layer -= 1

    def _read(self, index: int, part: slice) -> Tensor:
        return self.inputs.read(index, part).to(device=self.network.device, dtype=self.network.dtype)

    def _head(self) -> None:
        network, skip = self.network, self.sampling.skip
        hidden = self._read(network.shape.n_layer, slice(None))[:, skip:].contiguous()
        with torch.no_grad():
            normed = network.norm(hidden)
            by_normed = self._head_products(normed)
        for part in blocks(*normed.shape[:2]):
            leaf = hidden[part].detach().requires_grad_()
            out = network.norm(leaf)
            for draw in range(self.sampling.n_draws):
                (by_leaf,) = torch.autograd.grad(out, leaf, by_normed[draw, part], retain_graph=True)
                self.tally.gradient[draw, part, skip:] = by_leaf

    def _head_products(self, normed: Tensor) -> Tensor:
        """Measure the head; (draws, windows, tokens, n_embd) gradients by its inputs."""
        name, n_draws = self.network.head_name, self.sampling.n_draws
        head = HeadGradient(self.network, normed, n_draws=n_draws, seed=self.sampling.seed)
        normaliser = head.normaliser()
        hessian = torch.from_numpy(self.hessians.read(name)).to(head.weight)
        by_normed = torch.zeros((n_draws, *normed.shape), dtype=normed.dtype, device=normed.device)
        sums, touched = Sums(n_draws, len(normed)), []
        for rows in head.row_blocks():
            weight = head.weight[rows]
            expected = normed.new_zeros(len(weight))  # square of the noise, at a position
            noises: list[list[Tensor]] = []  # by part, by draw
            for part in head.windows():
                draws, squares = head.noise(rows, part, normaliser)
                expected += squares / normed[..., 0].numel()
                for draw, noise in enumerate(draws):
                    by_normed[draw, part] += noise @ weight
                noises.append(draws)
            here = self.touched[(self.touched >= rows.start) & (self.touched < rows.stop)] - rows.start
            sample = self._likely_rows(head, rows, expected, here)
            if sample is not None and not len(sample.index):
                continue
            made = RoundingErrors.make(self.errors, name, weight.float().cpu().numpy(), sample=sample)
            made = made.to(normed.device)
            sums.begin(name, made)
            for part, draws in zip(head.windows(), noises, strict=True):
                for draw, noise in enumerate(draws):
                    sums.add(draw, part, made.project(noise, normed[part]))
            if self.network.is_tied:
                places = here if sample is None else np.searchsorted(sample.index, here)
                touched.append(made.values[:, places].float().cpu().numpy())
            per_row = made.squares(hessian)
            sums.traces += per_row.sum(1)
            sums.kronecker += (per_row * made.of_rows(expected).cpu()).sum(1) / 2
            sums.squares += made.squares(None).sum(1)
        if sums.types:
            sums.add_inputs(slice(None), project_inputs(by_normed[0], normed))
            self.tally.entries[name] = sums.entry()
        if self.network.is_tied:
            self.tally.touched = np.concatenate(touched, 1)
        return by_normed

    def _likely_rows(
        self, head: HeadGradient, rows: slice, expected: Tensor, touched: np.ndarray
    ) -> RowSample | None:
        """Of a block of the head's rows: those that the text makes likely, by the `expected` square of their
        noise, those that a tied table is asked for, and a share of the others."""
        chances = np.full(len(expected), min(1.0, HEAD_WEIGHTS / head.weight.numel()))
        chances = np.maximum(chances, HEAD_ROWS * expected.double().cpu().numpy())
        if self.network.is_tied:
            chances[touched] = 1
        seed = np.random.SeedSequence(self.sampling.seed, spawn_key=(rows.start,))
        return RowSample.drawn(chances, np.random.default_rng(seed))

    def _layer(self, index: int) -> None:
        network, n_draws = self.network, self.sampling.n_draws
        layer = network.layer(index)
        made = self._layer_errors(layer.weights)
        found = {name: Sums(n_draws, len(self.windows)) for name in made}
        for name, sums in found.items():
            sums.begin(name, made[name])
        squares = {name: torch.zeros(each.values.shape[1]).double() for name, each in made.items()}
        for part in blocks(*self.windows.shape):
            hidden = self._read(index, part).requires_grad_()
            seen: list[tuple[str, Tensor, Tensor]] = []
            out = layer(hidden, lambda name, x, y, seen=seen: seen.append((name, x.detach(), y)))
            for draw in range(n_draws):
                wanted, more = [hidden, *(y for _, _, y in seen)], draw + 1 < n_draws
                gradient = self.tally.gradient[draw, part]
                by_hidden, *deltas = torch.autograd.grad(out, wanted, gradient, retain_graph=more)
                for (name, inputs, _), delta in zip(seen, deltas, strict=True):
                    if name not in made:
                        continue
                    found[name].add(draw, part, made[name].project(delta, inputs))
                    squares[name] += made[name].of_rows(delta.square().sum((0, 1))).cpu().double()
                    if draw == 0:  # one is enough for so few numbers
                        found[name].add_inputs(part, project_inputs(delta @ layer.weights[name], inputs))
                # only now: where nothing follows a product, its delta is this very memory
                self.tally.gradient[draw, part] = by_hidden
        n_all, n_tokens = n_draws * self.windows.size, self.windows.shape[1]
        scale = n_tokens / (2 * (n_tokens - self.sampling.skip))
        self._weigh(made, found, {name: scale * sums / n_all for name, sums in squares.items()})
        self.tally.entries |= {name: sums.entry() for name, sums in found.items()}

    def _layer_errors(self, weights: dict[str, Tensor]) -> dict[str, RoundingErrors]:
        """The errors of all matrices of a layer that have candidates, of large ones in a sample of rows."""
        matrices = {name: weight for name, weight in weights.items() if weight.dim() == 2}
        kept = sum(min(len(weight), SAMPLED_ROWS) * weight.shape[1] for weight in matrices.values())
        dtype = torch.float32 if 4 * LIKELY_TYPES * kept <= ERROR_BYTES else torch.bfloat16
        found: dict[str, RoundingErrors] = {}
        for name, weight in matrices.items():
            sample = RowSample.spaced(len(weight))
            values = weight.float().cpu().numpy()
            made = RoundingErrors.make(self.errors, name, values, sample=sample, dtype=dtype)
            if made.types:
                found[name] = made.to(self.network.device)
        return found

    def _weigh(
        self, made: dict[str, RoundingErrors], found: dict[str, Sums], weights: dict[str, Tensor]
    ) -> None:
        """Traces and their Fisher-weighted kin, of a sample of the rows where there are many."""
        hessian, owner = None, ""
        for name in sorted(made, key=input_of):
            if owner != input_of(name):
                owner = input_of(name)
                hessian = torch.from_numpy(self.hessians.read(name)).to(self.network.device)
            rows = made[name].traced()
            share = made[name].values.shape[1] / len(rows)
            per_row = made[name].squares(hessian, rows)
            found[name].traces += share * per_row.sum(1)
            found[name].kronecker += share * (per_row * weights[name][rows]).sum(1)
            found[name].squares += made[name].squares(None).sum(1)

    def _embedding(self) -> None:
        """The lookup: added to the head's where the embedding is that too."""
        network, n_draws = self.network, self.sampling.n_draws
        tied = network.is_tied
        if tied and EMBEDDING not in self.tally.entries:
            return
        made, sums = self._touched_errors(), Sums(n_draws, len(self.windows))
        if not made.types:
            return
        sums.begin(EMBEDDING, made)
        index = torch.from_numpy(np.searchsorted(self.touched, self.windows)).to(network.device)
        per_row = made.squares(None)
        scale, n_scored = network.shape.embedding_scale, self.windows.shape[1] - self.sampling.skip
        for part in blocks(*self.windows.shape):
            for draw in range(n_draws):
                delta = self.tally.gradient[draw, part] * scale
                sums.add(draw, part, made.project_rows(delta, index[part]))
                strength = delta.square().mean(-1).cpu().double().flatten()
                sums.kronecker += per_row[:, index[part].flatten().cpu()] @ strength
        sums.kronecker /= 2 * n_scored * n_draws * len(self.windows)
        sums.traces += per_row[:, index.flatten().cpu()].mean(1) * scale**2
        sums.squares += per_row.sum(1)
        entry = sums.entry()
        if tied:
            head = self.tally.entries[EMBEDDING]
            head.projections = head.projections + entry.projections
            head.kronecker = head.kronecker + entry.kronecker
        else:
            self.tally.entries[EMBEDDING] = entry

    def _touched_errors(self) -> RoundingErrors:
        """Errors of the embedding's rows that occur."""
        if self.network.is_tied:
            assert self.tally.touched is not None
            types = tuple(str(kind) for kind in self.tally.entries[EMBEDDING].types)
            made = RoundingErrors(types, torch.from_numpy(self.tally.touched))
        else:
            weight = self.network.weight(EMBEDDING)[self.touched]
            made = RoundingErrors.make(self.errors, EMBEDDING, weight.float().cpu().numpy())
        return made.to(self.network.device)
