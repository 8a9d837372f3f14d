"""`lq quantize` from end to end: source -> texts -> importance -> files -> divergence -> report.

Owns the order, the lock on the folder and what is cleared away afterwards. A run that was stopped anywhere
goes on at the step where it stopped; a run with other parameters redoes only what depends on them.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from engine.llama import default_threads, gpu_name
from models.atomic import LEFT_BEHIND
from models.gguf import read_header
from quantize.card import card
from quantize.disk import disk_errors
from quantize.divergence import Estimate
from quantize.errors import QuantizeError
from quantize.frame import CannotConverse
from quantize.mixes import chart
from quantize.mixes.steps import Mixes
from quantize.plots import divergence_figure, speed_figure, tradeoff_figure, write_figure
from quantize.recovery.steps import trained_of
from quantize.report import (
    FileReport,
    MixReport,
    RecoveryReport,
    Report,
    SourceReport,
    TextReport,
    answers_of,
    divergence_of,
    recommended,
    to_json,
    trials_of,
    types_of,
)
from quantize.room import refuse_too_small_a_disk
from quantize.rounding import kernels
from quantize.samples import Answer
from quantize.settings import Progress, Settings, silent
from quantize.source import is_full_precision
from quantize.speed import Speed, processor
from quantize.steps import Facts, Ledger, Step, write_text
from quantize.structure.report import figures as structure_figures
from quantize.work import Work


class FolderBusy(QuantizeError):
    """Another run works in the same folder."""

    def __init__(self, out: Path) -> None:
        super().__init__(f"another `lq quantize` works in {out}; wait for it or choose another --out")


def run(settings: Settings, *, progress: Progress = silent) -> Report:
    """Do what is not done yet, write the report, and return it. Raises QuantizeError; finished steps stay."""
    description = settings.check()
    with disk_errors(settings.out / "work"), _locked(settings.out):
        work = Work(settings, description, progress)
        report = _Run(work).report()
        progress("writing the report", 0, None)
        _write(report, settings.out)
        _clear(work)
    return report


class _Run:
    """One pass over the steps."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.settings = work.settings
        self.ledger = Ledger(work.folder / "steps")
        self.taken: dict[str, Step] = {}
        self.evaluation: Step | None = work.texts.evaluation
        self.why_mute: str | None = work.description.mute

    def ensure(self, step: Step):
        self.taken[step.name] = step
        return self.ledger.ensure(step)

    def report(self) -> Report:
        """Run all steps in order; what the source or a text may fail at comes before what takes long."""
        work, settings = self.work, self.settings
        refuse_too_small_a_disk(settings.out, self.ledger.pending(work.steps()))
        source = self._source()
        for step in work.checks:
            self.ensure(step)
        text = self._text(work.texts.text, "text")
        calibration = self._text(work.texts.calibration, None)
        evaluation = self._held_out()
        if work.texts.lessons is not None:
            self.ensure(work.texts.lessons)
        work.generator_file.unlink(missing_ok=True)  # all that it writes is written
        source = replace(source, answers=self._answers(None))
        importance = self.ensure(work.importance) if work.importance else None
        explored = self.ensure(work.transforms.explored) if work.transforms else None
        made = {kind: self.ensure(work.made(kind)) for kind in settings.labels}
        Mixes.clear(work.folder)  # before the source's predictions, which are as large
        files = tuple(self._file(kind, facts) for kind, facts in made.items())
        structure = work.structure.report(
            self.ensure, self._recorded, self.evaluation, files, recommended(files).type
        )
        return Report(
            source=source,
            files=files,
            calibration=calibration,
            evaluation=evaluation,
            text=text,
            importance_sha256=importance["sha256"] if importance else None,
            command=settings.command,
            seed=settings.seed,
            machine=gpu_name() or processor(),
            n_threads=settings.backend.n_threads or default_threads(),
            versions={**work.versions, "python": platform.python_version()},
            transforms=trials_of(explored) if explored else (),
            seconds={name: self.ledger.seconds(step) for name, step in self.taken.items()},
            warnings=tuple(self._warnings(source, files, calibration)),
            structure=structure,
        )

    def _source(self) -> SourceReport:
        given, work = self.settings.source, self.work
        facts = self.ensure(work.facts)
        types = types_of(facts["types"])
        sha256 = work.source.parameters["sha256"]
        adapter = self.settings.adapter
        return SourceReport(
            name=given.name,
            given=given.given,
            format=types.shares[0].type,
            sha256=sha256,
            adapter=adapter.name if adapter else None,
            types=types,
            speed=Speed(**facts["speed"]),
            architecture=facts["architecture"],
            licence=given.licence,
            base_model=given.base_model,
        )

    def _held_out(self) -> TextReport | None:
        """The held-out conversations; None where the model writes none and another text takes their place."""
        try:
            return self._text(self.evaluation, "assistant")
        except CannotConverse as error:
            if self.settings.eval_text is None:
                raise
            self.evaluation, self.why_mute = None, error.reason
            return None

    def _text(self, step: Step | None, role) -> TextReport | None:
        if step is None:
            return None
        facts = self.ensure(step)
        n_scored = self._n_scored(step, role) if role else 0
        return TextReport(
            origin=facts["origin"],
            n_sequences=facts["n_sequences"],
            n_tokens=facts["n_tokens"],
            n_scored=n_scored,
            dropped=facts["dropped"],
            sha256=facts["sha256"],
        )

    def _n_scored(self, step: Step, role) -> int:
        return sum(len(passage.positions) for passage in self.work.passages(step, role))

    def _file(self, kind: str, facts) -> FileReport:
        work = self.work
        held_out = self.evaluation
        chats = self.ensure(work.divergence(kind, held_out, "assistant")) if held_out else None
        text = self.ensure(work.divergence(kind, work.texts.text, "text")) if work.texts.text else None
        speed = self.ensure(work.speed(kind))
        rounded = work.quantized(kind)
        recovery = self._recovery(kind, facts) if self.settings.recover else None
        rounding = self._recorded(rounded)
        self.taken[rounded.name] = rounded
        return FileReport(
            type=kind,
            file=work.file(kind).name,
            sha256=facts["sha256"],
            types=types_of(facts["types"]),
            speed=Speed(**speed),
            chats=divergence_of(chats),
            text=divergence_of(text),
            warning=rounding.get("warning"),
            mix=self._mix(kind, rounding),
            answers=self._answers(kind),
            recovery=recovery,
        )

    def _recorded(self, step: Step) -> Facts:
        """What a step told, even if its file is gone: a rounded one is, once it was trained."""
        return self.ledger.recorded(step) or self.ensure(step)

    def _recovery(self, kind: str, facts) -> RecoveryReport:
        """What training did to a file; the rounded one is gone after the run."""
        work, held_out = self.work, self.evaluation
        chats = work.divergence(kind, held_out, "assistant", rounded=True) if held_out else None
        text = work.divergence(kind, work.texts.text, "text", rounded=True) if work.texts.text else None
        return RecoveryReport(
            kept=facts["kept"],
            chats_before=divergence_of(self.ensure(chats)) if chats else None,
            text_before=divergence_of(self.ensure(text)) if text else None,
            judged=tuple(Estimate(**each) for each in facts["judged"] or ()),
            trained=trained_of(facts),
        )

    def _answers(self, kind: str | None) -> tuple[Answer, ...]:
        held_out = self.evaluation
        return answers_of(self.ensure(self.work.samples(kind, held_out)) if held_out else None)

    def _mix(self, label: str, facts) -> MixReport | None:
        mixes = [budget for budget in self.settings.budgets if budget.label == label]
        if not mixes:
            return None
        return self.work.mixes.report(self.ensure(self.work.mixes.plan(mixes[0])), facts)

    def _warnings(
        self, source: SourceReport, files: tuple[FileReport, ...], calibration: TextReport | None
    ) -> Iterator[str]:
        if self.settings.source.kind == "gguf" and not is_full_precision(read_header(self.work.source_file)):
            yield f"The source is quantized itself ({source.format}): divergence is measured against that."
        if self.evaluation is None and self.settings.eval_text:
            yield (
                f"{self.why_mute}: there are no held-out conversations, and divergence is measured on "
                f"{self.settings.eval_text.name} alone."
            )
        yield from self.work.description.notes
        if self.settings.budgets and not kernels.are_there():
            yield (
                f"Rounding's loops are not compiled for this CPU ({kernels.library_path().name}), so it took "
                "three times as long: install lq anew where a C++ compiler is."
            )
        if calibration and "no chat template" in calibration.origin:
            yield "The model has no chat template, so the texts are what it writes from its first token on."
        for file in files:
            if file.warning:
                yield file.warning
            if file.recovery and not file.recovery.kept:
                yield (
                    f"{file.type}: training did not lower the divergence on text that was held back, so the "
                    "file is as it was rounded."
                )


def _write(report: Report, out: Path) -> None:
    """report.md, report.json and the plots, each whole or not at all."""
    figures = {
        "divergence": divergence_figure(report),
        "tradeoff": tradeoff_figure(report),
        "speed": speed_figure(report),
    }
    figures |= structure_figures(report.structure) if report.structure else {}
    for name, figure in figures.items():
        if figure is not None:
            write_figure(figure, out, name)
    for file in report.files:
        if file.mix is not None:
            figure = chart.figure(f"{report.source.name}, {file.type}", file.mix.tensors)
            write_figure(figure, out, f"types-{file.type}")
    write_text(out / "report.json", to_json(report))
    write_text(out / "report.md", card(report))


def _clear(work: Work) -> None:
    """Remove large intermediate files; what needed them is done."""
    large = [*work.folder.glob("reference-*.f32"), *work.folder.glob("rounded-*.gguf"), work.generator_file]
    large += (work.folder / "recovery").glob("*")
    large += work.structure.large
    if work.settings.source.kind == "checkpoint" and not work.settings.keep_source:
        large.append(work.source_file)
    for path in large:
        path.unlink(missing_ok=True)
    Mixes.clear(work.folder)
    if work.transforms is not None:
        work.transforms.clear()


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    (out / "work").mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / "work" / ".lock", timeout=0)
    try:
        with lock:
            for left in (*out.glob(LEFT_BEHIND), *(out / "work").rglob(LEFT_BEHIND)):
                left.unlink()  # by a run that was killed
            yield
    except Timeout:
        raise FolderBusy(out) from None
