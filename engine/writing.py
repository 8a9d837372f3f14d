"""One request while it is written: tokens are chosen, become text, and end at a stop.

Owns the request's samplers and the state of its text. Which tokens are computed when is not its business.
"""

import time
from dataclasses import dataclass, field

from engine.llama import Context
from engine.request import Delta, Done, FinishReason, GenerationRequest, TokenLogprob
from engine.sampling import Sampler, logprobs
from engine.sequence import Chunk, Sequence
from engine.text import Decoder, StopStrings


@dataclass(frozen=True, slots=True)
class Ending:
    """Why nothing more is written."""

    reason: FinishReason
    stop_token: int | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """What one call gave a request."""

    tokens: list[int]  # chosen, the one that ended it included
    n_right: int  # guesses that were chosen too
    delta: Delta | None
    ending: Ending | None


@dataclass(eq=False, slots=True)
class Writing:
    """A request beside its scheduling; `close` frees its samplers."""

    request: GenerationRequest
    sequence: Sequence
    sampler: Sampler
    stops: StopStrings
    decoder: Decoder = field(default_factory=Decoder)
    admitted_s: float = 0.0
    first_s: float = 0.0  # when the first token was chosen
    last_s: float = 0.0  # when tokens came last

    def choose(self, context: Context, chunk: Chunk, last: int) -> Progress:
        """Tokens from the logits of batch entry `last` and, as long as guesses are right, of those before.

        The guesses of the chunk lie at the entries up to `last`. Raises what the sampler raises.
        """
        guesses = chunk.tokens[len(chunk.tokens) - chunk.n_draft :] if chunk.n_draft else []
        first = last - len(guesses)
        chosen: list[int] = []
        details: list[TokenLogprob] = []
        text, ending = "", None
        while ending is None:
            at = len(chosen)
            token = self.sampler.sample(first + at)
            chosen.append(token)
            if self.request.logprobs is not None:
                details.append(logprobs(context, first + at, token, n_top=self.request.logprobs))
            if token in context.model.eog_tokens:
                ending = Ending("stop", token)
                del details[at:]  # it is in no Delta, nor are its probabilities
                break
            text += self.stops.step(self.decoder.step(context.model.written(token)))
            if self.stops.found is not None:
                ending = Ending("stop")
            elif self.sequence.n_written + len(chosen) >= self.sequence.max_tokens:
                ending = Ending("length")
            elif at == len(guesses) or token != guesses[at]:
                break
        n_shown = len(chosen) - (ending is not None and ending.stop_token is not None)
        n_right = len(chosen) - 1
        n_prompt = 0 if self.sequence.n_written else len(self.sequence.prompt)
        self.last_s = time.perf_counter()
        self.first_s = self.first_s or self.last_s
        delta = Delta(text, tuple(chosen[:n_shown]), tuple(details), n_prompt) if n_shown else None
        return Progress(chosen, n_right, delta, ending)

    def done(self, ending: Ending) -> tuple[Delta | None, Done]:
        """The last events: text that was held back in vain, and the end."""
        sequence, now = self.sequence, time.perf_counter()
        held = self.stops.flush()
        done = Done(
            ending.reason,
            n_prompt_tokens=len(sequence.prompt),
            n_completion_tokens=sequence.n_written,
            n_cached_tokens=sequence.n_cached or 0,
            stop_string=self.stops.found,
            stop_token=ending.stop_token,
            prefill_s=self.first_s - self.admitted_s,
            decode_s=now - self.first_s,
        )
        return (Delta(held, ()) if held else None), done

    def close(self) -> None:
        """Free the native samplers."""
        self.sampler.close()
