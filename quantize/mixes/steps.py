"""Files within a budget: sensitivities -> a type for each tensor -> the best of a few, measured -> rounded.

The steps and what each depends on; `quantize.steps` decides which of them run. Texts, importance and the
measuring of finished files are `quantize.work`'s.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from engine.llama import gpu_name
from models.gguf import read_header
from quantize.calibration.imatrix import ImportanceMatrix
from quantize.gguf_files.header import padded
from quantize.gguf_files.mixed_file import (
    ImportanceNote,
    MixedSource,
)
from quantize.gguf_files.typemap import read_types
from quantize.measure import Backend, Passage
from quantize.mixes.allocate import (
    ALLOWANCE,
    Choice,
    Interactions,
    Mix,
    Objective,
    Tensor,
    allocate,
    speed_weight,
)
from quantize.mixes.budget import FIT, Budget, fit, room
from quantize.mixes.candidates import TYPES, Candidates
from quantize.mixes.encoding import Losses, Nearest
from quantize.mixes.gains import Sampler, factor, rounding_gains
from quantize.mixes.in_order import VERSION as IN_ORDER
from quantize.mixes.judging import VERSION as JUDGING
from quantize.mixes.judging import ratio, typical
from quantize.mixes.kernel_times import KernelTimes, Shape, kernel_times, kernels
from quantize.mixes.workshop import SCRATCH, UNSEEN, VERSION, WINDOW, Workshop
from quantize.network.hessian import STORED, Hessians
from quantize.network.network import Network
from quantize.network.stream import forward
from quantize.report import MixReport, Tried
from quantize.rounding.exact import OnLattice, held, with_lattices
from quantize.sensitivity.backward import ROWS, Sampling, measure_sensitivities
from quantize.sensitivity.record import Sensitivities
from quantize.source import digest
from quantize.steps import Facts, Step, write_text

SAMPLING = Sampling(n_draws=2)
#: Changes when the same inputs come to other sensitivities or Hessians.
MEASURING = 4
#: Types of full precision that are half as large as float32.
HALVES = "F16", "BF16"

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True, slots=True)
class Request:
    """What the mixes of one run are made for and where: `folder` for what lies there meanwhile.

    `finish`: what is yet to be done to a file once its weights are rounded. `most_bytes`: a file of the
    largest type has about so many, however generous its budget; `hessian_bytes`: the second moments.
    """

    source: Path
    folder: Path
    matrix: Path
    objective: Objective
    backend: Backend
    progress: Progress
    passages: Callable[[], Sequence[Passage]]
    times: Path
    most_bytes: int
    hessian_bytes: int = 0
    finish: Callable[[Path], None] | None = None
    lattices: Callable[[], Mapping[str, OnLattice]] = dict


class Mixes:
    """The steps from sensitivities to files. `ready` are the source first, the calibration, the importance,
    and what else they hang on."""

    def __init__(self, request: Request, ready: tuple[Step, ...]) -> None:
        self.request = request
        self.ready = ready

    @cached_property
    def sensitivities(self) -> Step:
        """What each type costs each tensor, and the Hessians, which are collected on the way."""
        parameters = {
            "version": MEASURING,
            "types": TYPES,
            "window": WINDOW,
            "unseen": UNSEEN,
            "sampling": dataclasses.asdict(SAMPLING),
            "rows": ROWS,
        }
        return Step("sensitivities", self._measure, parameters, self.ready, (self.sensitivity_file,))

    @property
    def sensitivity_file(self) -> Path:
        """Where they are kept; other budgets of the same model reuse them."""
        return self.request.folder / "sensitivities.npz"

    def _measure(self) -> Facts:
        windows = self._workshop.windows()
        found = measure_sensitivities(
            Network.open(self.request.source),
            windows,
            with_lattices(self._candidates.errors, self._lattices),
            self._hessians,
            self.request.folder / "sensitivities",
            key=self.sensitivities.key,
            sampling=SAMPLING,
            progress=self.request.progress,
        )
        found.save(self.sensitivity_file)
        return {"n_samples": found.n_samples, "n_scored": found.n_scored, "windows": len(windows)}

    @property
    def _texts(self) -> Path:
        return self.request.folder / "calibration.jsonl"

    @cached_property
    def hessians(self) -> Step:
        """Collected anew where a finished run's are gone: they are large, and sensitivities are kept."""
        last = self.hessian_folder / "hessian-head.safetensors"
        parameters = {"version": MEASURING, "window": WINDOW, "unseen": UNSEEN, "stored": STORED}
        there = sum(path.stat().st_size for path in self.hessian_folder.glob("*.safetensors"))
        size = max(0, self.request.hessian_bytes - there)
        return Step("hessians", self._collect, parameters, self.ready, (last,), size)

    def _collect(self) -> Facts:
        network = Network.open(self.request.source)
        forward(network, self._workshop.windows(), hessians=self._hessians, progress=self.request.progress)
        return {}

    @property
    def hessian_folder(self) -> Path:
        """Second moments of what every tensor is multiplied with."""
        return self.request.folder / "hessians"

    @property
    def _hessians(self) -> Hessians:
        self.hessian_folder.mkdir(parents=True, exist_ok=True)
        return Hessians(self.hessian_folder, self.hessians.key)

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(ImportanceMatrix.read(self.request.matrix).means())

    @cached_property
    def _lattices(self) -> Mapping[str, OnLattice]:
        """Tensors that are packed as they are."""
        return self.request.lattices()

    @cached_property
    def _source(self) -> MixedSource:
        return MixedSource.open(self.request.source)

    @cached_property
    def _choices(self) -> dict[str, dict[str, int]]:
        """Tensor -> type -> bytes: TYPES, and its own type where that has 16 bits, which leaves a tensor as
        it is, and what is multiplied with it almost so."""
        found = self._source.choices(TYPES)
        for tensor in self._source.quantizable:
            if tensor.type.name in HALVES:
                found[tensor.name][tensor.type.name] = padded(tensor.size_bytes, self._source.alignment)
        return found

    @cached_property
    def _note(self) -> ImportanceNote:
        matrix = ImportanceMatrix.read(self.request.matrix)
        return ImportanceNote(self.request.matrix.name, len(matrix.entries), None, matrix.n_chunks)

    def check(self, budgets: Sequence[Budget]) -> Step:
        """What refuses budgets that no file fits, before anything takes long."""
        asked = [dataclasses.asdict(budget) for budget in budgets]
        parameters = {"version": VERSION, "budgets": asked}
        return Step("budgets", lambda: self._check(budgets), parameters, (self.ready[0],))

    def _check(self, budgets: Sequence[Budget]) -> Facts:
        # as many bytes as the true one, whose numbers are not known yet
        note = ImportanceNote(self.request.matrix.name, 1, None, 1)
        for budget in budgets:
            asked = fit(self.request.source) if budget == FIT else budget
            room(asked, self._source, self._choices, note)
        return {}

    @cached_property
    def gains(self) -> Step:
        """What rounding better than to nearest leaves of each type's cost."""
        needs, out = (self.sensitivities, self.hessians, self.ready[0]), self._gain_file
        return Step("rounding-gains", self._sample, {"version": VERSION}, needs, (out,))

    @property
    def _gain_file(self) -> Path:
        return self.request.folder / "rounding-gains.json"

    def _sample(self) -> Facts:
        folder = self.request.folder / "gains" / self.gains.key[:16]
        encode = self._workshop.best(Losses(folder))
        sampler = Sampler(self._source, self._choices, encode, folder)
        found = rounding_gains(
            sampler,
            n_processes=self._workshop.crew.n_processes,
            progress=lambda done, total: self.request.progress("rounding samples", done, total),
        )
        write_text(self._gain_file, json.dumps(found, indent=1))
        return {"gains": found}

    def plan(self, budget: Budget) -> Step:
        """Which type each tensor gets."""
        asked: dict[str, Any] = {"budget": dataclasses.asdict(budget), "objective": self.request.objective}
        if self.request.objective != "size":
            asked["allowance"] = ALLOWANCE[self.request.objective]
            asked["timed_with"] = dataclasses.asdict(self.request.backend) | {"kernels": kernels()}
        needs = (self.sensitivities, self.gains, self.hessians, self.ready[0])
        parameters = {"version": VERSION, "judging": JUDGING, **asked}
        return Step(
            f"mix-{budget.label}", lambda: self._plan(budget), parameters, needs, (self._plan_file(budget),)
        )

    def _plan_file(self, budget: Budget) -> Path:
        return self.request.folder / f"mix-{budget.label}.json"

    def _plan(self, budget: Budget) -> Facts:
        found = Sensitivities.load(self.sensitivity_file)
        tensors = self._tensors(found)
        left = self._room(budget)
        weight = speed_weight(tensors, left, self.request.objective)
        allocation = allocate(tensors, left, interactions=_interactions(found, tensors), weight=weight)
        mixes = [allocation.best, *allocation.runners_up]
        judged = self._try(mixes)
        measured = typical(judged)
        best = chosen(mixes, measured, weight)
        plan = {"types": mixes[best].types, "measured": measured[best], "judged": judged[best]}
        write_text(self._plan_file(budget), json.dumps(plan, indent=1))
        return {
            "chosen": best,
            "tensors": mixes[best].types,
            "nats_per_byte": allocation.nats_per_byte,
            "shrinkage": allocation.shrinkage,
            "tried": [
                {"predicted": mix.cost, "size_bytes": mix.size_bytes, "measured": kl}
                for mix, kl in zip(mixes, measured, strict=True)
            ],
        }

    def _room(self, budget: Budget) -> int:
        """Bytes for all tensors. What fits in memory is no wish for more than 8 bits: twice the bytes take
        twice the time, for next to nothing."""
        asked = fit(self.request.source) if budget == FIT else budget
        left = room(asked, self._source, self._choices, self._note).tensor_bytes
        eight_bits = sum(sizes["Q8_0"] for sizes in self._choices.values())
        return min(left, eight_bits) if budget == FIT else left

    def _tensors(self, found: Sensitivities) -> list[Tensor]:
        """Every tensor with what each of its types takes: bytes, divergence and, where they count, time."""
        costs, times, header = found.shrunk(), self._times(), read_header(self.request.source)
        gains = json.loads(self._gain_file.read_text("utf-8"))
        on_cpu = self.request.backend.n_gpu_layers == 0 or gpu_name() is None
        result = []
        for tensor in self._source.quantizable:
            row, listed = found.names.index(tensor.name), []
            for kind, size in self._choices[tensor.name].items():
                ms, cost = times.milliseconds(header, tensor, kind) if times else 0.0, 0.0
                if kind != tensor.type.name:
                    cost = float(costs[row, found.types.index(kind)]) * factor(gains, tensor.name, kind)
                inputs = found.of_inputs(tensor.name, kind) if on_cpu else 0.0
                listed.append(Choice(kind, size, cost, ms, inputs))
            result.append(Tensor(tensor.name, tuple(listed)))
        return result

    def _times(self) -> KernelTimes | None:
        """None where only bytes count."""
        if self.request.objective == "size":
            return None
        header = read_header(self.request.source)
        kinds = dict.fromkeys(kind for each in self._choices.values() for kind in each)
        return kernel_times(
            Shape.like(header), [*kinds], Nearest(Candidates({})),
            store=self.request.times, backend=self.request.backend,
            progress=partial(self.request.progress, "timing the types on this machine"),
        )  # fmt: skip

    def _try(self, mixes: Sequence[Mix]) -> list[list[float]]:
        """Divergences of mixes, by piece of some calibration text."""
        found, shop = [], self._workshop
        for number, mix in enumerate(mixes):
            out = shop.tries / "try.gguf"
            shop.alone(out, mix.types, f"rounding mix {number + 1} of {len(mixes)}")
            self.request.progress("trying the best mixes", number, len(mixes))
            found.append(shop.judge(out))
            out.unlink()
        return found

    @cached_property
    def _workshop(self) -> Workshop:
        return Workshop(
            source=self._source, folder=self.request.folder, texts=self._texts,
            passages=self.request.passages, candidates=self._candidates, hessians=self._hessians,
            lattices=self._lattices, note=self._note, key=self.sensitivities.key,
            backend=self.request.backend, progress=self.request.progress,
        )  # fmt: skip

    @staticmethod
    def clear(folder: Path) -> None:
        """Remove large folders that no finished run needs again, also of a run that was stopped before."""
        Hessians(folder / "hessians", "").drop_last()
        for name in ("sensitivities", "hessians", "gains", *SCRATCH):
            shutil.rmtree(folder / name, ignore_errors=True)

    def file(self, budget: Budget, out: Path) -> Step:
        """The file itself, every tensor rounded as well as can be."""
        plan = self.plan(budget)
        parameters = {"version": VERSION, "judging": JUDGING, "in_order": IN_ORDER}
        size = int(0.9 * min(budget.file_bytes or 0, self.request.most_bytes))
        needs = (plan, self.hessians, self.ready[0])
        return Step(
            f"quantize-{budget.label}", lambda: self._make(budget, out), parameters, needs, (out,), size
        )

    def _make(self, budget: Budget, out: Path) -> Facts:
        plan = json.loads(self._plan_file(budget).read_text("utf-8"))
        types, shop = plan["types"], self._workshop
        losses = shop.alone(out, types, f"rounding {out.name}")
        compared, again = [plan["measured"]], shop.tries / "in-order.gguf"
        if shop.in_order(again, types, f"rounding {out.name} in order"):
            compared.append(plan["measured"] * ratio(shop.judge(again), plan["judged"]))
            if compared[1] < compared[0]:
                shutil.move(again, out)
            again.unlink(missing_ok=True)
        if self.request.finish is not None:
            self.request.finish(out)
        return {
            "sha256": digest(out),
            "types": dataclasses.asdict(read_types(out)),
            "warning": None,
            "rounding_loss": losses.gain(types),
            "compared": compared,
            "packed": held(out, self._lattices),
        }

    def report(self, plan: Facts, file: Facts) -> MixReport:
        """How a file came about, from what its steps recorded."""
        return MixReport(
            objective=self.request.objective,
            tensors=plan["tensors"],
            tried=tuple(Tried(**tried) for tried in plan["tried"]),
            chosen=plan["chosen"],
            rounding_loss=file["rounding_loss"],
            compared=tuple(file["compared"]),
        )


def chosen(mixes: Sequence[Mix], measured: Sequence[float], weight: float) -> int:
    """The place of the mix that is best by measured divergence, in nats, and time, at `weight` nats a ms."""
    return min(range(len(mixes)), key=lambda index: measured[index] + weight * mixes[index].milliseconds)


def _interactions(found: Sensitivities, tensors: Sequence[Tensor]) -> Interactions:
    """The projections in the order of the tensors and of each one's own types."""
    widest = max(len(tensor.choices) for tensor in tensors)
    ordered = np.zeros((found.n_samples, len(tensors), widest), np.float32)
    for row, tensor in enumerate(tensors):
        for place, choice in enumerate(tensor.choices):
            if choice.type in found.types:  # what stays as it is adds nothing
                measured = found.names.index(tensor.name), found.types.index(choice.type)
                ordered[:, row, place] = found.projections[:, *measured]
    shares = found.shares[[found.names.index(tensor.name) for tensor in tensors]]
    return Interactions(ordered, found.n_scored, shares=shares)
