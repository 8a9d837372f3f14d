"""Measure one file with each type of cached keys and values: the steps, and the record they end in.

Each pair and text is a step of its own, so a run that was stopped goes on with the next. Which pairs are
measured follows from the first ones' results. Texts and the source's predictions are `quantize.work`'s.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.llama import gpu_name
from models.footprint import can_quantize, kv_bytes_per_cell
from models.gguf import read_header
from quantize.divergence import Divergence, Estimate, clustered, summarise
from quantize.errors import QuantizeError
from quantize.kv_cache.pairs import EXACT, ON_GPU, SHARE, Measured, Pair, alone, promising, recommend
from quantize.kv_cache.report import CacheReport, PairReport
from quantize.measure import Backend, Passage, scores_against, scores_between, some, write_reference
from quantize.report import divergence_of
from quantize.speed import measure_speed
from quantize.steps import Facts, Step

#: Scored tokens of each text: the same tokens for every pair, so little is needed to tell them apart.
TOKENS = 2048

Progress = Callable[[str, int, int | None], None]


class CannotQuantizeCache(QuantizeError):
    """Heads that no block of 32 divides."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"--kv-cache: the heads of {path.name} are no multiple of 32 wide, so llama.cpp stores its keys "
            "and values as f16, bf16 or f32 alone; leave the option out"
        )


def refuse_narrow_heads(path: Path) -> None:
    """Raise CannotQuantizeCache where there is nothing to choose from."""
    if not can_quantize(read_header(path)):
        raise CannotQuantizeCache(path)


@dataclass(frozen=True, slots=True)
class Text:
    """Held-out passages and the step that keeps the source's predictions of them."""

    name: str
    told: str
    passages: Callable[[], Sequence[Passage]]
    reference: Step


@dataclass(frozen=True, slots=True)
class Cache:
    """One file whose cache is measured. `folder`: where the predictions with f16 cells lie meanwhile."""

    file: Path
    made: Step
    texts: tuple[Text, ...]
    folder: Path
    backend: Backend
    progress: Progress

    def bytes_of(self, pair: Pair) -> int:
        """Bytes of a token in all layers."""
        return kv_bytes_per_cell(read_header(self.file), type_k=pair[0], type_v=pair[1])

    def exact(self, text: Text) -> Step:
        """The file's own predictions with f16 cells."""
        out = self.folder / f"reference-kv-{text.name}.f32"

        def make() -> Facts:
            write_reference(self.file, self._some(text), out, backend=self._with(EXACT))
            return {}

        return Step(f"kv-f16-{text.name}", make, self._parameters, (self.made, text.reference), (out,))

    def measured(self, pair: Pair, text: Text) -> Step:
        """How far the file is with these cells from itself with f16 cells, and from the source."""
        return self._compared(f"kv-{'-'.join(pair)}-{text.name}", " / ".join(pair), self._with(pair), text)

    def floor(self, text: Text) -> Step:
        """The same for f16 cells again, whose attention sums with other rounding."""
        backend = dataclasses.replace(self._with(EXACT), unified=True)
        return self._compared(f"kv-floor-{text.name}", "f16, summed otherwise", backend, text)

    def _compared(self, name: str, told: str, backend: Backend, text: Text) -> Step:
        exact, source = self.exact(text), text.reference

        def make() -> Facts:
            def tell(done: int, total: int) -> None:
                self.progress(f"measuring the cache as {told}", done, total)

            passages, references = self._some(text), [exact.outputs[0], source.outputs[0]]
            own, true = scores_against(self.file, passages, references, backend=backend, progress=tell)
            before = scores_between(source.outputs[0], exact.outputs[0], passages)
            more = clustered([new.kl - old.kl for new, old in zip(true, before, strict=True)])
            return {
                "own": dataclasses.asdict(summarise(own)),
                "source": dataclasses.asdict(summarise(true)),
                "added": dataclasses.asdict(more),
            }

        return Step(name, make, self._parameters, (exact, source))

    def speed(self, pair: Pair) -> Step:
        """How fast the file runs with these cells."""

        def make() -> Facts:
            self.progress(f"timing the cache as {' / '.join(pair)}", 0, None)
            return dataclasses.asdict(measure_speed(self.file, backend=self._with(pair)))

        return Step(f"kv-speed-{'-'.join(pair)}", make, self._parameters, (self.made,))

    @property
    def on_gpu(self) -> bool:
        """Whether attention runs on a GPU."""
        return self.backend.n_gpu_layers != 0 and gpu_name() is not None

    @property
    def _parameters(self) -> dict[str, Any]:
        return {"tokens": TOKENS, "threads": (self.backend.n_threads, self.backend.n_gpu_layers)}

    def _with(self, pair: Pair) -> Backend:
        return dataclasses.replace(self.backend, type_k=pair[0], type_v=pair[1])

    def _some(self, text: Text) -> list[Passage]:
        return some(text.passages(), TOKENS)


def measure_cache(cache: Cache, ensure: Callable[[Step], Facts]) -> CacheReport:
    """Every type alone, then the promising pairs; `ensure` runs a step or remembers it."""
    study = _Study(cache, ensure)
    deciding = cache.texts[0].name
    floor = {text.name: _divergence(ensure(cache.floor(text))["own"]) for text in cache.texts}
    pairs = alone()
    found = {pair: study.row(pair) for pair in pairs}
    chosen = promising({pair: row.from_f16[deciding].kl.mean for pair, row in found.items()}, cache.bytes_of)
    found |= {pair: study.row(pair) for pair in chosen}
    exact = study.row(EXACT)
    limit = SHARE * exact.from_source[deciding].kl.mean
    measured = [
        Measured(pair, row.bytes_per_token, row.added[deciding].mean, row.added[deciding].standard_error)
        for pair, row in found.items()
    ]
    best = recommend(measured, limit, ON_GPU if cache.on_gpu else None)
    timed = [EXACT] if best is None else [EXACT, best]
    return CacheReport(
        file=cache.file.name,
        texts={text.name: text.told for text in cache.texts},
        n_scored={name: divergence.n_tokens for name, divergence in exact.from_source.items()},
        pairs=(exact, *found.values()),
        floor=floor,
        limit=limit,
        recommended=best,
        on_gpu=cache.on_gpu,
        tokens_written={" / ".join(pair): ensure(cache.speed(pair))["decode"] for pair in timed},
    )


@dataclass(frozen=True)
class _Study:
    """Rows of the record, measured when they are asked for."""

    cache: Cache
    ensure: Callable[[Step], Facts]

    def row(self, pair: Pair) -> PairReport:
        """One pair on all texts."""
        facts = {text.name: self.ensure(self.cache.measured(pair, text)) for text in self.cache.texts}
        own = {name: _divergence(fact["own"]) for name, fact in facts.items()}
        return PairReport(
            type_k=pair[0],
            type_v=pair[1],
            bytes_per_token=self.cache.bytes_of(pair),
            from_f16={} if pair == EXACT else own,
            from_source={name: _divergence(fact["source"]) for name, fact in facts.items()},
            added={name: Estimate(**fact["added"]) for name, fact in facts.items()},
        )


def _divergence(facts: Mapping[str, Any]) -> Divergence:
    found = divergence_of(facts)
    assert found is not None
    return found
