"""The steps that make a run's texts: what the model writes, and windows of files.

What is written, `quantize.calibration.texts` knows; which steps run, `quantize.steps`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quantize.calibration import calibrate, filters
from quantize.calibration.calibrate import Plan, Purpose
from quantize.calibration.conversation import Conversation, Role, read
from quantize.calibration.texts import N_WORDS, WINDOW, Written, cut_text, joined, write_conversations
from quantize.frame import VARIABLES
from quantize.settings import Progress, Settings
from quantize.source import digest
from quantize.steps import Facts, Step

#: How texts are made; a change makes them anew.
RULES = {
    "temperatures": calibrate.TEMPERATURES,
    "min_question_temperature": calibrate.MIN_QUESTION_TEMPERATURE,
    "min_p": calibrate.MIN_P,
    "plain": (calibrate.PLAIN_PERIOD, calibrate.PLAIN_TEMPERATURES, calibrate.PLAIN_MIN_P, N_WORDS),
    "template": VARIABLES,
    "loop": (filters.LOOP_MIN, filters.LOOP_SHARE, filters.SAME_SHARE, filters.MIN_TOKENS),
}

TOLD: Mapping[Purpose, str] = {
    "calibration": "writing calibration conversations",
    "evaluation": "writing held-out conversations",
    "recovery": "writing conversations to learn from",
}


@dataclass(frozen=True)
class Texts:
    """The texts of one run, in `folder`. `mute`: the model can write none. The `generator` writes them, and
    the `source` tells how files are tokenised."""

    settings: Settings
    mute: bool
    folder: Path
    source: Step
    source_file: Path
    generator: Step
    generator_file: Path
    progress: Progress

    @cached_property
    def calibration(self) -> Step | None:
        """The texts that importance is collected on."""
        settings = self.settings
        if settings.calibration == "none":
            return None
        if isinstance(settings.calibration, Path):
            return self._file_step("calibration", settings.calibration, settings.calibration_tokens)
        if settings.calibration_text is not None:
            return self._chats_beside(settings.calibration_text)
        return self._conversation_step(self._chats_and_prose("calibration"))

    @property
    def calibration_roles(self) -> tuple[Role, ...]:
        """Whose tokens of it count where something is chosen by them."""
        own, cut = self.settings.calibration == "self", self.settings.calibration_text is not None
        return ("assistant", "text") if own and cut else ("assistant",) if own else ("text",)

    def _chats_beside(self, text: Path) -> Step:
        """Half of it the model's own chats; windows of a text file in place of its own plain text."""
        settings = self.settings
        chats, windows, out = (self.file(name) for name in ("chats", "beside", "calibration"))
        half = settings.calibration_tokens // 2
        plan = Plan("calibration", settings.seed, half, n_parallel=settings.n_parallel)
        n_tokens = settings.calibration_tokens - half
        parameters = self._writing(plan) | self._cutting(text, n_tokens)
        needs = (self.source, self.generator)
        own_key = Step(
            "chats", dict, self._writing(plan), (self.generator,)
        ).key  # other files change no chat

        def make() -> Facts:
            cut = self._cut(text, windows, n_tokens)  # first: it refuses what cannot be read
            own = self._converse(plan, chats, own_key)
            return dataclasses.asdict(joined(own, chats, cut, windows, out))

        return Step("calibration", make, parameters, needs, (out,))

    @cached_property
    def evaluation(self) -> Step | None:
        """Held-out conversations, of other seeds and other questions than the calibration's; None for a
        model that cannot write any."""
        settings = self.settings
        if self.mute:
            return None
        plan = Plan(
            "evaluation", settings.seed, settings.eval_tokens, ("assistant",), n_parallel=settings.n_parallel
        )
        return self._conversation_step(plan, *([self.calibration] if settings.calibration == "self" else []))

    @cached_property
    def lessons(self) -> Step | None:
        """What recovery learns from: text that the layers were not rounded by, which has little left to say,
        where the model writes it; else the calibration."""
        settings = self.settings
        if not settings.recover:
            return None
        if settings.calibration != "self":
            return self.calibration
        return self._conversation_step(self._chats_and_prose("recovery"), self.calibration, self.evaluation)

    def _chats_and_prose(self, purpose: Purpose) -> Plan:
        """Text to round or to train by."""
        settings = self.settings
        return Plan(
            purpose,
            settings.seed,
            settings.calibration_tokens,
            n_parallel=settings.n_parallel,
            with_plain=True,
        )

    @cached_property
    def text(self) -> Step | None:
        """Windows of the public text; half of each is scored."""
        settings = self.settings
        if settings.eval_text is None:
            return None
        return self._file_step("text", settings.eval_text, 2 * settings.eval_tokens)

    def file(self, name: str) -> Path:
        """Where a text step writes."""
        return self.folder / f"{name}.jsonl"

    def _conversation_step(self, plan: Plan, *avoided: Step | None) -> Step:
        avoid = tuple(step for step in avoided if step is not None)
        parameters, needs = self._writing(plan), (self.generator, *avoid)
        out = self.file(plan.purpose)
        keyed = Step(plan.purpose, dict, parameters, needs)

        def make() -> Facts:
            seen = [text for step in avoid for text in read(self.file(step.name))]
            return dataclasses.asdict(self._converse(plan, out, keyed.key, seen))

        return Step(plan.purpose, make, parameters, needs, (out,))

    def _writing(self, plan: Plan) -> dict[str, Any]:
        threads = self.settings.backend.n_threads, self.settings.backend.n_gpu_layers
        return {"plan": dataclasses.asdict(plan), "rules": RULES, "threads": threads}

    def _converse(self, plan: Plan, out: Path, key: str, avoid: Sequence[Conversation] = ()) -> Written:
        """Let the model write, or go on with a file of the same key."""
        return write_conversations(
            self.generator_file,
            out,
            plan,
            key=key,
            backend=self.settings.backend,
            avoid=avoid,
            progress=lambda done, total: self.progress(TOLD[plan.purpose], done, total),
        )

    def _file_step(self, name: str, path: Path, n_tokens: int) -> Step:
        out = self.file(name)

        def make() -> Facts:
            return dataclasses.asdict(self._cut(path, out, n_tokens))

        return Step(name, make, self._cutting(path, n_tokens), (self.source,), (out,))

    def _cutting(self, path: Path, n_tokens: int) -> dict[str, Any]:
        return {"sha256": digest(path), "name": path.name, "n_tokens": n_tokens, "window": WINDOW}

    def _cut(self, path: Path, out: Path, n_tokens: int) -> Written:
        """Windows of a text file."""
        self.progress(f"cutting {path.name}", 0, None)
        backend = self.settings.backend
        return cut_text(self.source_file, path, out, n_tokens=n_tokens, key=out.stem, backend=backend)
