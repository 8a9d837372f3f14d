"""The steps of a run as a graph: what each makes, where, and from what.

One method a step; `quantize.steps` decides which of them run. The order and the report are the pipeline's.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models.gguf import read_header
from models.lora import Adapter
from quantize.calibration.conversation import Role, read
from quantize.calibration.importance import collect
from quantize.calibration.steps import Texts
from quantize.convert import convert
from quantize.describe import Description
from quantize.gguf_files.child import quantize
from quantize.gguf_files.typemap import fallback_warning, read_types
from quantize.gguf_files.types import Order
from quantize.measure import Passage, measure, passages, write_reference
from quantize.mixes.steps import Mixes, Request
from quantize.recovery.steps import Recoveries
from quantize.room import least_bytes
from quantize.samples import N_QUESTIONS, N_TOKENS, answers
from quantize.settings import Progress, Settings
from quantize.source import digest
from quantize.speed import measure_speed
from quantize.steps import Facts, Step
from quantize.structure.steps import Structure
from quantize.transforms.steps import Request as TransformsRequest
from quantize.transforms.steps import Transforms


class Work:
    """The steps of one run. Intermediate files lie in `folder`, results in the run's `out`."""

    def __init__(self, settings: Settings, description: Description, progress: Progress) -> None:
        self.settings = settings
        self.description = description
        self.progress = progress
        self.folder = settings.out / "work"
        self.versions = {name: version(name) for name in ("llama-cpp-python", "gguf")}

    @cached_property
    def source(self) -> Step:
        """The full-precision GGUF: converted, or the one that was given."""
        settings = self.settings
        parameters: dict[str, Any] = {"sha256": digest(settings.source.path), **self.versions}
        if settings.source.kind == "gguf":
            return Step("source", dict, parameters)
        parameters["pre"] = settings.pre
        parameters["adapter"] = digest(settings.adapter) if settings.adapter else None
        size = self.description.source_bytes
        return Step("source", self._convert, parameters, outputs=(self.source_file,), least_bytes=size)

    @property
    def source_file(self) -> Path:
        """Where the full-precision GGUF lies, ours or the user's own."""
        if self.settings.source.kind == "gguf":
            return self.settings.source.path
        return self.folder / "source.gguf"

    def _convert(self) -> Facts:
        adapter = Adapter.open(self.settings.adapter) if self.settings.adapter else None
        convert(
            self.settings.source.path,
            self.source_file,
            adapter=adapter,
            pre=self.settings.pre,
            progress=lambda _, done, total: self.progress("converting the checkpoint", done, total),
        )
        return {}

    @cached_property
    def facts(self) -> Step:
        """Types and speed of the source, kept after its file is gone."""
        return Step("description", self._describe, {"threads": self._threads}, (self.source,))

    def _describe(self) -> Facts:
        self.progress("timing the source", 0, None)
        speed = measure_speed(self.source_file, backend=self.settings.backend)
        return {
            "types": dataclasses.asdict(read_types(self.source_file)),
            "speed": dataclasses.asdict(speed),
            "architecture": read_header(self.source_file).architecture,
        }

    @property
    def _threads(self) -> tuple[int | None, int | None]:
        return self.settings.backend.n_threads, self.settings.backend.n_gpu_layers

    @cached_property
    def generator(self) -> Step:
        """The source as Q8_0: half the memory, fast on every processor, and nearly lossless."""
        size = least_bytes("Q8_0", self.description)
        return Step("generator", self._make_generator, {}, (self.source,), (self.generator_file,), size)

    @property
    def generator_file(self) -> Path:
        """Where the Q8_0 that writes the texts lies, while they are written."""
        return self.folder / "generator.gguf"

    def _make_generator(self) -> Facts:
        self._quantize(Order(self.source_file, self.generator_file, "Q8_0"), "the generator")
        return {}

    @cached_property
    def texts(self) -> Texts:
        """The texts that files are made by and measured on."""
        return Texts(
            settings=self.settings,
            mute=bool(self.description.mute),
            folder=self.folder,
            source=self.source,
            source_file=self.source_file,
            generator=self.generator,
            generator_file=self.generator_file,
            progress=self.progress,
        )

    @cached_property
    def importance(self) -> Step | None:
        """The importance matrix, in llama.cpp's own format."""
        if self.texts.calibration is None:
            return None
        needs = (self.structure.weights, self.texts.calibration)
        return Step("importance", self._collect, {}, needs, (self.matrix_file,))

    @cached_property
    def structure(self) -> Structure:
        """Which layers and tensors the files are made of, and what is told of them."""
        return Structure(self)

    @property
    def matrix_file(self) -> Path:
        """Where the importance matrix lies; it is one of the results."""
        return self.settings.out / "imatrix.gguf"

    def _collect(self) -> Facts:
        backend = self.settings.backend
        matrix = collect(
            self.structure.weights_file,
            [conversation.tokens for conversation in read(self.texts.file("calibration"))],
            dataset="calibration.jsonl",
            n_threads=backend.n_threads,
            n_gpu_layers=backend.n_gpu_layers,
            progress=self._ticker("collecting importance"),
        )
        matrix.write(self.matrix_file)
        return {"sha256": digest(self.matrix_file), "n_entries": len(matrix.entries)}

    def file(self, kind: str) -> Path:
        """Where the file of a type lies."""
        return self.settings.out / self.settings.source.file_name(kind)

    @cached_property
    def transforms(self) -> Transforms | None:
        """The steps to a changed source that files are made from; None where none is to be tried."""
        if self.settings.explore is None:
            return None
        assert self.texts.calibration is not None
        assert self.importance is not None
        request = TransformsRequest(
            source=self.structure.weights_file,
            folder=self.folder / "transforms",
            calibration=self.texts.file("calibration"),
            matrix=self.matrix_file,
            type=self.settings.explore,
            rounding="best" if self.settings.budgets else "nearest",
            roles=self.texts.calibration_roles,
            seed=self.settings.seed,
            backend=self.settings.backend,
            progress=self.progress,
        )
        return Transforms(request, (self.structure.weights, self.texts.calibration, self.importance))

    @property
    def _made_from(self) -> tuple[Path, Path | None]:
        """The GGUF that files are made from, and its importance matrix."""
        if self.transforms is not None:
            return self.transforms.file, self.transforms.matrix
        return self.structure.weights_file, None if self.importance is None else self.matrix_file

    @cached_property
    def mixes(self) -> Mixes:
        """The steps to the files that have a budget."""
        assert self.texts.calibration is not None
        assert self.importance is not None
        calibration, changes = self.texts.calibration, self.transforms
        request = Request(
            source=self._made_from[0],
            folder=self.folder,
            matrix=self._made_from[1] or self.matrix_file,
            objective=self.settings.objective,
            backend=self.settings.backend,
            progress=self.progress,
            passages=lambda: self.passages(calibration, *self.texts.calibration_roles),
            times=self.settings.times or self.folder / "kernel-times.json",
            most_bytes=least_bytes("Q8_0", self.description),
            hessian_bytes=0 if self.structure.layers else self.description.hessian_bytes,
            finish=None if changes is None else changes.finish,
            lattices=self.structure.known_lattices if changes is None else dict,
        )
        if changes is not None:
            return Mixes(request, (changes.changed, calibration, changes.changed))
        return Mixes(request, (self.structure.weights, calibration, self.importance, self.structure.lattices))

    @property
    def checks(self) -> list[Step]:
        """What refuses what cannot work, before anything takes long."""
        budgets, found = self.settings.budgets, self.structure.checks
        if budgets and self.structure.layers is None and self.transforms is None:
            found.append(self.mixes.check(budgets))
        return found

    @cached_property
    def recoveries(self) -> Recoveries:
        """The steps that train what was rounded."""
        assert self.texts.lessons is not None
        return Recoveries(
            source=self.source_file,
            texts=self.texts.file(self.texts.lessons.name),
            folder=self.folder,
            backend=self.settings.backend,
            progress=self.progress,
            ready=(self.source, self.texts.lessons),
        )

    def made(self, kind: str) -> Step:
        """One of the files, as the user gets it: of a type, or of a budget's label."""
        rounded = self.quantized(kind)
        return self.recoveries.step(kind, rounded, self.file(kind)) if self.settings.recover else rounded

    def rounded_file(self, kind: str) -> Path:
        """Where a file lies once it is rounded; where it is trained afterwards, only meanwhile."""
        return self.folder / f"rounded-{kind}.gguf" if self.settings.recover else self.file(kind)

    def quantized(self, kind: str) -> Step:
        """One of the files, rounded."""
        for budget in self.settings.budgets:
            if budget.label == kind:
                return self.mixes.file(budget, self.rounded_file(kind))
        structure = self.structure
        needs = (structure.weights, structure.lattices, *([self.importance] if self.importance else []))
        if self.transforms is not None:
            needs = (self.transforms.changed,)
        parameters = {"type": kind, "allow_requantize": self.settings.allow_requantize}
        size = least_bytes(kind, self.description)
        out = self.rounded_file(kind)
        return Step(f"quantize-{kind}", lambda: self._make(kind), parameters, needs, (out,), size)

    def _make(self, kind: str) -> Facts:
        source, importance = self._made_from
        order = Order(source, self.rounded_file(kind), kind, importance)
        out, fallbacks, packed = order.out, self._quantize(order, kind), []
        if self.transforms is not None:
            self.transforms.finish(out)
        else:
            again = partial(self._quantize, what=kind)
            fallbacks, packed = self.structure.pack(order, fallbacks, again)
        types = read_types(out)
        warning = fallback_warning(kind, fallbacks, types)
        facts = {"sha256": digest(out), "types": dataclasses.asdict(types), "warning": warning}
        return {**facts, "packed": packed}

    def _quantize(self, order: Order, what: str):
        ready = dataclasses.replace(
            order,
            n_threads=self.settings.backend.n_threads or 0,
            allow_requantize=self.settings.allow_requantize,
        )
        return quantize(ready, progress=lambda i, n, name: self.progress(f"quantizing {what}: {name}", i, n))

    def reference(self, texts: Step, role: Role) -> Step:
        """The source's predictions over some texts."""
        out = self.folder / f"reference-{texts.name}.f32"

        def make() -> Facts:
            ticker = self._ticker("predicting with the source")
            passages_ = self.passages(texts, role)
            write_reference(self.source_file, passages_, out, backend=self.settings.backend, progress=ticker)
            return {"n_scored": sum(len(passage.positions) for passage in passages_)}

        return Step(
            f"reference-{texts.name}",
            make,
            {"threads": self._threads},
            (self.source, texts),
            (out,),
            4 * self._least_scored(role) * self.description.n_vocab,
        )

    def _least_scored(self, role: Role) -> int:
        """Tokens scored at least; of a text file half, if its tokens are not longer than eight bytes."""
        text = self.settings.eval_text
        if role == "text" and text is not None:
            return min(self.settings.eval_tokens, text.stat().st_size // 16)
        return self.settings.eval_tokens

    def divergence(self, kind: str, texts: Step, role: Role, *, rounded: bool = False) -> Step:
        """How far one file is from the source over some texts. `rounded`: before it was trained."""
        reference = self.reference(texts, role)
        file = self.quantized(kind) if rounded else self.made(kind)

        def make() -> Facts:
            ticker = self._ticker(f"measuring {kind}")
            found = measure(
                file.outputs[0],
                self.passages(texts, role),
                reference.outputs[0],
                backend=self.settings.backend,
                progress=ticker,
            )
            return dataclasses.asdict(found)

        name = f"rounded-{kind}" if rounded else kind
        return Step(f"divergence-{texts.name}-{name}", make, {}, (reference, texts, file))

    def speed(self, kind: str) -> Step:
        """How fast one file runs here."""

        def make() -> Facts:
            self.progress(f"timing {kind}", 0, None)
            return dataclasses.asdict(measure_speed(self.file(kind), backend=self.settings.backend))

        return Step(f"speed-{kind}", make, {"threads": self._threads}, (self.made(kind),))

    def samples(self, kind: str | None, texts: Step) -> Step:
        """What one file, None: the source, answers to a few held-out questions."""

        def make() -> Facts:
            self.progress(f"asking {kind or 'the source'}", 0, None)
            path = self.file(kind) if kind else self.source_file
            found = answers(path, read(self.texts.file(texts.name)), backend=self.settings.backend)
            return {"answers": [dataclasses.asdict(answer) for answer in found]}

        made = self.made(kind) if kind else self.source
        rules = {"questions": N_QUESTIONS, "tokens": N_TOKENS, "threads": self._threads}
        return Step(f"samples-{kind or 'source'}", make, rules, (made, texts))

    def steps(self) -> list[Step]:
        """What the report is made of, all that it needs following from it."""
        held_out, text = self.texts.evaluation, self.texts.text
        found = [self.facts, self.texts.calibration, held_out, text, self.importance]
        found.append(self.transforms.changed if self.transforms else None)
        found.append(self.samples(None, held_out) if held_out else None)
        for kind in self.settings.labels:
            found += [self.made(kind), self.speed(kind)]
            found.append(self.samples(kind, held_out) if held_out else None)
            for rounded in (False, True)[: 1 + self.settings.recover]:
                found.append(
                    self.divergence(kind, held_out, "assistant", rounded=rounded) if held_out else None
                )
                found.append(self.divergence(kind, text, "text", rounded=rounded) if text else None)
        return [step for step in [*self.structure.steps(), *found] if step]

    def passages(self, texts: Step, *roles: Role) -> list[Passage]:
        """What a text step wrote, with the tokens of some roles scored."""
        return passages(read(self.texts.file(texts.name)), *roles)

    def _ticker(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.progress(what, done, total)
