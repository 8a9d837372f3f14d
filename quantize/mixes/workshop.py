"""Make files of given types, each tensor on its own or all in the order of their layers, and compare them.

Owns the folders of what is rounded and the text that files are compared on. Which types a file gets is
decided elsewhere.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from engine.llama import default_threads
from engine.memory import available_memory
from quantize.calibration.conversation import read
from quantize.divergence import join
from quantize.gguf_files.mixed_file import Crew, ImportanceNote, MixedSource, Parts, matrices, write_mixed
from quantize.measure import Backend, Passage, some, token_scores, write_reference
from quantize.mixes.candidates import Candidates
from quantize.mixes.encoding import Best, Losses, one_thread
from quantize.mixes.in_order import VERSION as IN_ORDER
from quantize.mixes.in_order import InOrder
from quantize.mixes.judging import pieces
from quantize.network.hessian import Hessians, input_of
from quantize.network.network import EMBEDDING, lookups
from quantize.network.stream import TooFewTokens, cut, digest_of
from quantize.rounding.exact import Exact, OnLattice

#: Tokens of a window: shorter ones tell more from as many tokens.
WINDOW = 128
#: Scored tokens of the calibration text that choose among files, and how much of all these are at most.
CHOOSING_TOKENS, CHOOSING_SHARE = 2048, 0.125
#: Of the calibration text: a short one is not halved to keep what files are compared on unseen.
MOST = 0.75
#: What tells which text sensitivities and Hessians are of.
UNSEEN = MOST, CHOOSING_TOKENS, CHOOSING_SHARE
#: Of free memory what rounding may take, and what of it a weight of the largest matrix and a number of the
#: widest Hessian do: the matrix, what it is rounded to and its bytes; the factors.
MEMORY_SHARE, BYTES_A_WEIGHT, BYTES_A_MOMENT = 0.6, 12, 48
#: Changes when the same inputs come to other bytes; not for sums' last bits, which CPUs differ in too.
VERSION = 4

#: Folders that no finished run needs again: rounded tensors, files that are compared, the state between.
PARTS, TRIES, BETWEEN = SCRATCH = "parts", "tries", "in-order"

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class Workshop:
    """For one source. `texts`: its calibration; `passages`: what of that is scored. `key` says what all bytes
    depend on but a file's types. `lattices`: tensors that are packed as they are."""

    source: MixedSource
    folder: Path
    texts: Path
    passages: Callable[[], Sequence[Passage]]
    candidates: Candidates
    hessians: Hessians
    lattices: Mapping[str, OnLattice]
    note: ImportanceNote
    key: str
    backend: Backend
    progress: Progress

    def alone(self, out: Path, types: Mapping[str, str], what: str) -> Losses:
        """A file with every tensor rounded on its own, as well as can be. Tensors are kept: what is rounded
        for one file is not again for another."""
        losses = Losses(self.parts.folder)
        write_mixed(
            self.source, out, types, Exact(self.best(losses), self.lattices), parts=self.parts,
            made_from=self._alone, note=self.note, whole_matrices=True, crew=self.crew,
            progress=lambda name, done, total: self.progress(f"{what}: {name}", done, total),
        )  # fmt: skip
        return losses

    def in_order(self, out: Path, types: Mapping[str, str], what: str) -> bool:
        """The same file, which `alone` made, with its layers rounded in their order; False, and no file,
        where no text is left to do that by but what files are compared on."""
        try:
            windows = self.unseen()
        except TooFewTokens:
            return False
        key = digest_of(IN_ORDER, self.key, sorted(types.items()), windows)
        names = {tensor.name for tensor in self.source.quantizable}
        settled = frozenset(self.lattices) | (names & {EMBEDDING})

        def made_from(name: str, kind: str) -> str:
            return self._alone(name, kind) if name in settled else f"in order {key}"

        wanted = {each.tensor.name: each for each in matrices(self.source, types, made_from)}
        InOrder(
            source=self.source.path, wanted=wanted, settled=settled, parts=self.parts,
            folder=self.folder / BETWEEN, key=key, n_processes=self.crew.n_processes,
            progress=lambda name, done, total: self.progress(f"{what}: {name}", done, total),
        ).run(windows)  # fmt: skip
        write_mixed(
            self.source, out, types, Exact(self.best(Losses(self.parts.folder)), self.lattices),
            parts=self.parts, made_from=made_from, note=self.note, whole_matrices=True,
        )  # fmt: skip
        for name in names - settled:
            if wanted[name].key is not None:  # no other file has them
                self.parts.path(wanted[name]).unlink()
        return True

    def windows(self) -> np.ndarray:
        """(windows, WINDOW) ids of the calibration text, if MOST stays without what files are compared on."""
        everything = cut([text.tokens for text in read(self.texts)], WINDOW)
        try:
            unseen = self.unseen()
        except TooFewTokens:
            return everything
        return unseen if len(unseen) >= MOST * len(everything) else everything

    def unseen(self) -> np.ndarray:
        """The same without what files are compared on, which would take those for better that have seen it;
        raises TooFewTokens."""
        compared = {tuple(passage.tokens) for passage in self.compared}
        return cut([text.tokens for text in read(self.texts) if tuple(text.tokens) not in compared], WINDOW)

    def judge(self, path: Path) -> list[float]:
        """Mean divergences of a file from the source, by piece of the text that files are compared on."""
        reference = self.tries / f"reference-{self.key[:16]}.f32"
        if not reference.exists():  # of another file of this run
            write_reference(self.source.path, self.compared, reference, backend=self.backend)
        scores = join(token_scores(path, self.compared, reference, backend=self.backend))
        return pieces(scores.kl)

    @cached_property
    def compared(self) -> Sequence[Passage]:
        """Part of the calibration text."""
        passages = self.passages()
        n_scored = sum(len(passage.positions) for passage in passages)
        return some(passages, min(CHOOSING_TOKENS, int(CHOOSING_SHARE * n_scored)) or 1)

    @property
    def tries(self) -> Path:
        """The folder of files that are compared."""
        return _made(self.folder / TRIES)

    @property
    def parts(self) -> Parts:
        """Rounded tensors."""
        return Parts(_made(self.folder / PARTS))

    def best(self, losses: Losses) -> Best:
        """How a tensor is rounded on its own."""
        return Best(self.candidates, self.hessians, losses, lookups(self.source.files))

    def _alone(self, _name: str, _kind: str) -> str:
        """What the bytes of such a tensor depend on."""
        return f"best {VERSION} {self.key}"

    @property
    def crew(self) -> Crew:
        """As many processes as threads were given, and as find memory."""
        wanted = self.backend.n_threads or default_threads()
        largest = max(math.prod(tensor.shape[:2]) for tensor in self.source.quantizable)
        widest = max(tensor.shape[0] for tensor in self.source.quantizable)
        each = BYTES_A_WEIGHT * largest + BYTES_A_MOMENT * widest**2
        room = int(MEMORY_SHARE * available_memory()) // each
        return Crew(max(1, min(wanted, room)), input_of, one_thread)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
