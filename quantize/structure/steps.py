"""The steps about a model's structure, and the part of the report that they end in.

Layers left out come before everything that is made of the weights; lattices before rounding; figures of
tensors and the types of the KV cache after it. `quantize.work` has all other steps, and `quantize.pipeline`
runs them.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from models.gguf import read_header
from models.tensor_types import TensorType
from quantize.calibration.conversation import Role
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.gguf_files.child import Fallback
from quantize.gguf_files.mixed_file import MixedSource
from quantize.gguf_files.types import Order
from quantize.kv_cache.steps import Cache, Text, measure_cache, refuse_narrow_heads
from quantize.measure import measure
from quantize.report import FileReport, divergence_of
from quantize.room import least_bytes
from quantize.rounding.exact import OnLattice, find_lattices, no_larger, repack
from quantize.sensitivity.record import Sensitivities
from quantize.source import is_full_precision
from quantize.steps import Facts, Step, write_text
from quantize.structure import prune_steps
from quantize.structure.lattice_report import LatticeReport
from quantize.structure.outliers import PROBES, TensorFigures, figures
from quantize.structure.prune_report import PruneReport, report_of
from quantize.structure.prune_steps import Layers
from quantize.structure.report import StructureReport
from quantize.structure.tensor_report import TensorReport

if TYPE_CHECKING:
    from quantize.work import Work

#: Changes when the same weights come to other figures, or to other lattices.
VERSION = 1
#: What a file is taken to be for `--prune-layers auto` where no size is asked for.
USUAL_TYPE = "Q4_K_M"

Ensure = Callable[[Step], Facts]


class Structure:
    """The steps of one run; `work` has all that they need."""

    def __init__(self, work: "Work") -> None:
        self.work = work
        self.settings = work.settings

    @cached_property
    def layers(self) -> Layers | None:
        """Which layers are left out; None where all stay."""
        work, asked = self.work, self.settings.prune_layers
        calibration = work.texts.calibration
        if asked is None or calibration is None:
            return None
        request = prune_steps.Request(
            source=work.source_file,
            copy=work.generator_file,
            out=work.folder / "pruned.gguf",
            folder=work.folder / "pruning",
            asked=asked,
            target_bytes=self._target_bytes,
            backend=self.settings.backend,
            passages=lambda: work.passages(calibration, *work.texts.calibration_roles),
            texts=work.texts.file(calibration.name),
            progress=work.progress,
            allow_requantize=self.settings.allow_requantize,
        )
        return Layers(request, (work.source, work.generator, calibration))

    @property
    def _target_bytes(self) -> int:
        """Size of the smallest file that was asked for, as far as that is known."""
        description = self.work.description
        n_parameters = description.n_matrix + description.n_vector
        sizes = [least_bytes(kind, description) for kind in self.settings.types]
        for budget in self.settings.budgets:
            if budget.file_bytes is not None:
                sizes.append(budget.file_bytes)
            elif budget.bits_per_weight is not None:
                sizes.append(int(budget.bits_per_weight * n_parameters / 8))
        return min(sizes, default=least_bytes(USUAL_TYPE, description))

    @property
    def weights(self) -> Step:
        """What every file is made of."""
        return self.layers.pruned if self.layers else self.work.source

    @property
    def weights_file(self) -> Path:
        """Where that lies."""
        return self.layers.request.out if self.layers else self.work.source_file

    @property
    def checks(self) -> list[Step]:
        """What refuses a model that the options do not fit, before anything takes long."""
        found = [self.layers.checked] if self.layers else []
        if self.settings.kv_cache:
            found.append(Step("kv-check", self._check_heads, {}, (self.work.source,)))
        return found

    def _check_heads(self) -> Facts:
        refuse_narrow_heads(self.work.source_file)
        return {}

    @property
    def large(self) -> list[Path]:
        """What no finished run needs again."""
        return [] if self.layers is None or self.settings.keep_source else [self.layers.request.out]

    @cached_property
    def lattices(self) -> Step:
        """Tensors that were quantized before; none are looked for in a source that still is."""
        return Step("lattices", self._find, {"version": VERSION}, (self.weights,), (self.lattice_file,))

    @property
    def lattice_file(self) -> Path:
        """Where they are kept."""
        return self.work.folder / "lattices.json"

    def _find(self) -> Facts:
        found: dict[str, OnLattice] = {}
        if is_full_precision(read_header(self.weights_file)):
            source = MixedSource.open(self.weights_file)
            found = find_lattices(source, progress=self._ticker("looking for weights that were quantized"))
        facts = {name: dataclasses.asdict(one) for name, one in found.items()}
        write_text(self.lattice_file, json.dumps(facts, indent=1))
        return {"tensors": facts}

    def known_lattices(self) -> dict[str, OnLattice]:
        """What the step found."""
        facts = json.loads(self.lattice_file.read_text("utf-8"))
        return {name: OnLattice(**one) for name, one in facts.items()}

    def pack(
        self, order: Order, rounded: tuple[Fallback, ...], again: Callable[[Order], tuple[Fallback, ...]]
    ) -> tuple[tuple[Fallback, ...], list[str]]:
        """Let a file that llama.cpp rounded hold the tensors that lie on lattices as they are.

        `again` makes the file anew, where a lattice's own type takes no more bytes than the recipe's. Returns
        the fallbacks and the names of the tensors that are exact.
        """
        lattices = self.known_lattices()
        if better := no_larger(order.out, lattices):
            patterns = [(name.replace(".", r"\."), kind) for name, kind in better.items()]
            overrides = tuple((f"^{pattern}$", int(TensorType[kind])) for pattern, kind in patterns)
            rounded = again(dataclasses.replace(order, overrides=overrides))
        packed = repack(MixedSource.open(order.source), order.out, lattices) if lattices else []
        return rounded, packed

    @cached_property
    def tensors(self) -> Step:
        """What makes each tensor hard to round."""
        needs = [self.weights, *([self.work.importance] if self.work.importance else [])]
        if self.settings.budgets:
            needs.append(self.work.mixes.sensitivities)
        return Step("tensors", self._look, {"version": VERSION, "types": PROBES}, tuple(needs))

    def _look(self) -> Facts:
        if not is_full_precision(read_header(self.weights_file)):
            return {"tensors": []}
        matrix, costs = self.work.importance, {}
        if self.settings.budgets:
            costs = costs_of(self.work.mixes.sensitivity_file)
        found = figures(
            MixedSource.open(self.weights_file),
            ImportanceMatrix.read(self.work.matrix_file).means() if matrix else {},
            costs,
            progress=self._ticker("looking for what is hard to round"),
        )
        return {"tensors": [dataclasses.asdict(one) for one in found]}

    def cache(self, kind: str, held_out: Step | None) -> Cache:
        """The steps that measure one file's KV cache."""
        work = self.work
        texts: list[tuple[Step, Role, str]] = []
        if held_out:
            texts.append((held_out, "assistant", "held-out self-written chats"))
        if work.texts.text is not None and self.settings.eval_text is not None:
            texts.append((work.texts.text, "text", self.settings.eval_text.name))
        return Cache(
            file=work.file(kind),
            made=work.made(kind),
            texts=tuple(self._text(*text) for text in texts),
            folder=work.folder,
            backend=self.settings.backend,
            progress=work.progress,
        )

    def _text(self, step: Step, role: Role, told: str) -> Text:
        return Text(step.name, told, lambda: self.work.passages(step, role), self.work.reference(step, role))

    def _pruned_divergence(self, texts: Step, role: Role) -> Step:
        """How far the source is without the layers, not quantized."""
        reference = self.work.reference(texts, role)

        def make() -> Facts:
            passages = self.work.passages(texts, role)
            self.work.progress("measuring the model without the layers", 0, None)
            backend = self.settings.backend
            found = measure(self.weights_file, passages, reference.outputs[0], backend=backend)
            return dataclasses.asdict(found)

        return Step(f"divergence-{texts.name}-pruned", make, {}, (reference, texts, self.weights))

    def steps(self) -> list[Step]:
        """Those that are run in any case."""
        pruning = [self.layers.chosen] if self.layers else []
        return [*self.checks, *pruning, self.lattices, self.tensors]

    def report(
        self, ensure: Ensure, recorded: Ensure, held_out: Step | None, files: Sequence[FileReport], best: str
    ) -> StructureReport:
        """Run what is left and put it together. `recorded`: what a step told whose file may be gone; `best`:
        the label of the file to serve."""
        made = {file.file: recorded(self.work.quantized(file.type)) for file in files}
        listed = ensure(self.tensors)["tensors"]
        tensors = tuple(TensorFigures(**{**one, "shape": tuple(one["shape"])}) for one in listed)
        cache = self.cache(best, held_out) if self.settings.kv_cache else None
        return StructureReport(
            layers=self._layer_report(ensure, held_out),
            lattices=_lattice_report(ensure(self.lattices)["tensors"], len(tensors), made),
            tensors=TensorReport(tensors) if tensors else None,
            cache=measure_cache(cache, ensure) if cache else None,
        )

    def _layer_report(self, ensure: Ensure, held_out: Step | None) -> PruneReport | None:
        if self.layers is None:
            return None
        facts, text = ensure(self.layers.chosen), self.work.texts.text
        if not any(one["taken"] is not None for one in facts["rounds"]):
            return report_of(facts)
        return report_of(
            facts,
            divergence_of(ensure(self._pruned_divergence(held_out, "assistant"))) if held_out else None,
            divergence_of(ensure(self._pruned_divergence(text, "text"))) if text else None,
        )

    def _ticker(self, what: str) -> Callable[[str, int, int], None]:
        return lambda name, done, total: self.work.progress(f"{what}: {name}", done, total)


def costs_of(path: Path) -> dict[tuple[str, str], float]:
    """(tensor, type) -> predicted nats, of the types that tensors are looked at in."""
    found = Sensitivities.load(path)
    costs = found.shrunk()
    return {
        (name, kind): float(costs[row, found.types.index(kind)])
        for row, name in enumerate(found.names)
        for kind in PROBES
        if kind in found.types and costs[row, found.types.index(kind)] >= 0  # NaN: not offered
    }


def _lattice_report(
    found: Mapping[str, Mapping], n_tensors: int, made: Mapping[str, Facts]
) -> LatticeReport | None:
    if not found:
        return None
    return LatticeReport(
        n_tensors=n_tensors,
        types={name: one["type"] for name, one in found.items()},
        inexact={name: one["largest_error"] for name, one in found.items() if not one["is_exact"]},
        packed={file: tuple(facts["packed"]) for file, facts in made.items()},
    )
