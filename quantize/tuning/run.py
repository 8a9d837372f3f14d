"""`lq tune` from end to end: chats -> tokens -> training -> lower rank -> adapter, measured.

Owns the order. A run that was stopped anywhere goes on when the same command is given again; all that follows
the training is done anew, for it is quick.
"""

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch

from models.gguf import read_header
from models.lora import Adapter
from models.lora_gguf import convert_adapter
from models.source import sha256_of
from quantize.checkpoint import Checkpoint
from quantize.convert import Prepared, prepare
from quantize.disk import disk_errors
from quantize.families.supported import recognise
from quantize.plots import write_figure
from quantize.source import digest
from quantize.speed import processor
from quantize.steps import write_text
from quantize.tuning.adapter_files import header_of, write_peft
from quantize.tuning.chats import read_chats
from quantize.tuning.encoding import Encoded, Encoder, encode
from quantize.tuning.evaluation import Comparison, compare, mean_loss
from quantize.tuning.folder import Folder
from quantize.tuning.low_rank import Spectrum
from quantize.tuning.network import Frozen, Tunable, require_peft
from quantize.tuning.order import held_out
from quantize.tuning.own_text import encode_own_text, is_own_text, read_own_text
from quantize.tuning.quantized_base import check
from quantize.tuning.report import Report, Truncation, curve, page, to_json
from quantize.tuning.settings import LENGTH, BadOption, Settings
from quantize.tuning.state import Progressed
from quantize.tuning.training import Progress, Tell, Training

Text = TypeVar("Text")


@dataclass(frozen=True, slots=True)
class _Data:
    """What is learnt from, and what is held out."""

    learnt: Encoded
    held_out: Encoded | None
    sha256: str


def run(settings: Settings, *, progress: Progress, tell: Tell) -> Report:
    """Do what is not done yet, write adapter and report, and return it. Raises QuantizeError or ModelsError.

    `tell` gets a line at every evaluation.
    """
    require_peft()
    settings.check()
    settings.check_source()
    progress("reading the checkpoint's description", 0, None)
    base = prepare(settings.source.path)
    settings = replace(settings, max_length=_max_length(settings))
    if settings.base is not None:
        check(settings.source.path, settings.base)
    progress("reading the chats", 0, None)
    data = _data(settings, base)
    progress("hashing the checkpoint", 0, None)
    hashes = {"source sha256": digest(settings.source.path), "data sha256": data.sha256}
    if settings.base is not None:
        hashes["base sha256"] = sha256_of(settings.base)
    folder = Folder(settings.out)
    with disk_errors(folder.work), folder.claimed(hashes | settings.identity()):
        outcome = _Run(settings, base, data, progress=progress, tell=tell).outcome()
        progress("writing the report", 0, None)
        report = _report(settings, data, outcome, folder, hashes=hashes)
        _write(report, folder)
    return report


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What a pass found out; the adapter is in the folder."""

    told: Progressed
    n_steps: int
    comparison: Comparison | None
    truncation: Truncation | None
    moved: float


class _Run:
    """One pass."""

    def __init__(
        self, settings: Settings, base: Prepared, data: _Data, *, progress: Progress, tell: Tell
    ) -> None:
        self.settings, self.folder, self.base, self.data = settings, Folder(settings.out), base, data
        self.progress, self.tell = progress, tell
        self.held_out = data.held_out.examples if data.held_out else ()

    def outcome(self) -> _Outcome:
        """Train, cut, measure, write the adapter."""
        settings = self.settings
        self.progress("loading the model", 0, None)
        tunable = Tunable.of(
            settings.source.path,
            settings.shape,
            four_bit=settings.four_bit,
            seed=settings.schedule.seed,
            device=settings.device,
            compute=settings.compute,
            checkpointing=settings.checkpointing,
            base=settings.base,
            teacher=self._teacher(),
        )
        training = Training(
            tunable, self.data.learnt.examples, self.held_out, settings.schedule, self.folder.state
        )
        told = training.run(progress=self.progress, tell=self.tell)
        spectra = {module: Spectrum.of(b, a) for module, (b, a) in tunable.factors().items()}
        truncation = self._truncate(tunable, spectra)
        comparison = self._compare(tunable)
        self._write_adapter(tunable, spectra, truncation)
        moved = _moved(tunable, settings.shape.scale)
        return _Outcome(told, training.n_steps, comparison, truncation, moved)

    def _teacher(self) -> Frozen | None:
        """The source as it is, where its predictions are the aim."""
        settings = self.settings
        if not settings.distill:
            return None
        return Frozen.load(settings.source.path, device=settings.device, compute=settings.compute)

    def _truncate(self, tunable: Tunable, spectra: dict[str, Spectrum]) -> Truncation | None:
        """Cut the ranks in the model itself, so that what is measured is what is written."""
        settings = self.settings
        if settings.final_rank is None and settings.energy is None:
            return None
        ranks = {
            module: settings.final_rank or spectrum.rank_for(settings.energy or 1.0)
            for module, spectrum in spectra.items()
        }
        before = self._loss(tunable)
        tunable.assign({module: spectrum.factors(ranks[module]) for module, spectrum in spectra.items()})
        total = sum(float((spectrum.values**2).sum()) for spectrum in spectra.values())
        lost = sum(float((s.values[ranks[m] :] ** 2).sum()) for m, s in spectra.items())
        return Truncation(ranks, lost / total if total else 0.0, before, self._loss(tunable))

    def _loss(self, tunable: Tunable) -> float | None:
        if not self.held_out:
            return None
        return mean_loss(tunable, self.held_out, limit=self.settings.schedule.micro_tokens)

    def _compare(self, tunable: Tunable) -> Comparison | None:
        if not self.held_out:
            return None
        return compare(
            tunable,
            self.held_out,
            limit=self.settings.schedule.micro_tokens,
            progress=lambda done, total: self.progress("measuring the held-out chats", done, total),
        )

    def _write_adapter(
        self, tunable: Tunable, spectra: dict[str, Spectrum], truncation: Truncation | None
    ) -> None:
        self.progress("writing the adapter", 0, None)
        scale, source = self.settings.shape.scale, self.settings.source
        if truncation is None:
            factors = tunable.factors()
        else:
            factors = {m: spectrum.factors(truncation.ranks[m]) for m, spectrum in spectra.items()}
        factors = {module: (b * scale, a) for module, (b, a) in factors.items()}
        named = source.base_model or source.name
        write_peft(self.folder.adapter, factors, base_model=named, card=_card(self.settings, named))
        base = read_header(self.settings.base) if self.settings.base else header_of(self.base, source.path)
        convert_adapter(self.folder.adapter, base, self.folder.gguf)


def _moved(tunable: Tunable, scale: float) -> float:
    """Norm of the change over that of the adapted weights, all together."""
    factors = tunable.factors()
    change = sum(float(((b.T @ b) * (a @ a.T)).sum()) for b, a in factors.values())  # squares of b @ a
    return scale * (change / sum(tunable.base_norm(module) ** 2 for module in factors)) ** 0.5


def _report(
    settings: Settings, data: _Data, outcome: _Outcome, folder: Folder, *, hashes: Mapping[str, str]
) -> Report:
    adapter = Adapter.open(folder.adapter)
    sizes = {module: adapter.factors(module) for module in adapter.modules}
    n_parameters = sum(factors.a.size + factors.b.size for factors in sizes.values())
    n_trained = sum(f.a.size // f.rank + f.b.size // f.rank for f in sizes.values()) * settings.shape.rank
    files = (folder.adapter / "adapter_model.safetensors", folder.gguf)
    return Report(
        name=settings.name,
        source=settings.source.name,
        base=settings.base.name if settings.base else None,
        distilled=settings.distill,
        hashes=hashes,
        data=settings.data.name,
        command=settings.command,
        options=settings.identity(),
        learnt=data.learnt.facts,
        held_out=data.held_out.facts if data.held_out else None,
        training=outcome.told,
        n_steps=outcome.n_steps,
        comparison=outcome.comparison,
        truncation=outcome.truncation,
        moved=outcome.moved,
        n_trained=n_trained,
        n_parameters=n_parameters,
        n_gguf_bytes=folder.gguf.stat().st_size,
        files={path.relative_to(folder.out).as_posix(): sha256_of(path) for path in files},
        machine=f"{_device_name(settings.device)}, {settings.compute}",
        versions={name: version(name) for name in ("torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        warnings=tuple(_warnings(outcome.comparison, outcome.told, data.learnt.facts)),
    )


def _max_length(settings: Settings) -> int:
    """Longer sequences than the model was made for teach it nothing sound."""
    _, config = recognise(Checkpoint.open(settings.source.path).config)
    limit = config.integer("max_position_embeddings")
    if settings.max_length is None:
        return min(LENGTH, limit)
    if settings.max_length > limit:
        raise BadOption("--max-length", settings.max_length, f"at most the model's {limit} tokens")
    return settings.max_length


def _data(settings: Settings, base: Prepared) -> _Data:
    path, length = settings.data, settings.max_length or LENGTH
    if is_own_text(path):
        own = read_own_text(path)
        n_vocab = len(base.vocabulary.pieces)
        encoded = partial(encode_own_text, path=path, n_vocab=n_vocab, max_length=length)
        return _split(settings, own, [json.dumps(text.tokens) for text in own], encoded)
    chats = read_chats(path)
    encoder = Encoder.of(settings.source.path, base.vocabulary)
    encoded = partial(encode, encoder, path=path, max_length=length)
    return _split(settings, chats, [chat.text for chat in chats], encoded)


def _split(
    settings: Settings, texts: Sequence[Text], keys: Sequence[str], encoded: Callable[[list[Text]], Encoded]
) -> _Data:
    apart = held_out(keys, share=settings.share, seed=settings.schedule.seed)
    learnt, kept_back = ([t for i, t in enumerate(texts) if (i in apart) == side] for side in (False, True))
    return _Data(encoded(learnt), encoded(kept_back) if apart else None, sha256_of(settings.data))


def _warnings(comparison: Comparison | None, told: Progressed, facts: Any) -> list[str]:
    found = []
    if comparison and comparison.change.mean >= 0:
        found.append(
            "The held-out loss did not fall: more chats, fewer epochs or a lower --learning-rate may help."
        )
    if comparison and told.held_out and told.best_step < told.held_out[-1][0]:
        found.append(
            f"The held-out loss was lowest after step {told.best_step} and rose later; the adapter is "
            "that step's."
        )
    if facts["n_cut"]:
        found.append(f"{facts['n_cut']} sequences were cut at --max-length and do not show how they end.")
    return found


def _card(settings: Settings, base_model: str) -> str:
    licence = f"license: {settings.source.licence}\n" if settings.source.licence else ""
    return (
        f"---\nbase_model: {base_model}\nlibrary_name: peft\n{licence}tags: [lora]\n---\n\n"
        f"# {settings.name}\n\nA LoRA adapter for {base_model}, made by `lq tune`.\n"
    )


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()


def _write(report: Report, folder: Folder) -> None:
    write_figure(curve(report), folder.out, "loss")
    write_text(folder.out / "report.json", to_json(report))
    write_text(folder.out / "report.md", page(report))
