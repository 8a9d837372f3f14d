"""One sampler chain a sequence, built of llama.cpp's own samplers, and log-probabilities of what was chosen.

Greedy sampling takes the shortest way: an argmax over the logits, biases added, no chain at all.
"""

import secrets

import numpy as np

from engine.chain import Chain, Grammar
from engine.llama import Context
from engine.request import EngineError, InvalidRequest, Sampling, TokenLogprob

DRY_BREAKERS = ("\n", ":", '"', "*")
MIN_TEMPERATURE = 1e-6
_SEEDS = 2**32 - 1  # llama.cpp keeps the largest 32-bit value to mean "choose one"


class NoTokenAllowed(EngineError):
    """The grammar allows no token of the vocabulary at this point."""

    def __init__(self) -> None:
        super().__init__(
            "grammar: no token of this model can continue the text; loosen the grammar or lift logit biases"
        )


class NotANumber(EngineError):
    """The model's output is NaN: a broken file, or a type that overflows on this hardware."""

    def __init__(self) -> None:
        super().__init__("the model computed NaN instead of logits: the file may be broken, pull it again")


class Sampler:
    """Chooses the next tokens of one sequence; `prompt` is what penalties look back on at first."""

    def __init__(
        self, context: Context, sampling: Sampling, *, prompt: tuple[int, ...], ignore_eos: bool = False
    ) -> None:
        self._context = context
        biases = list(sampling.logit_bias)
        if ignore_eos:
            biases += [(token, float("-inf")) for token in sorted(context.model.eog_tokens)]
        _check_biases(biases, context.model.n_vocab)
        is_plain = _is_greedy(sampling) and sampling.grammar is None and not _penalises(sampling)
        self._chain = None if is_plain else _chain(context, sampling, biases)
        self._biases = _Biases(biases)
        self._grammar: Grammar | None = None
        if sampling.grammar is not None:
            self._grammar = Grammar.parse(context.model, sampling.grammar)
            if self._grammar is None:
                self.close()
                raise InvalidRequest(
                    "grammar: llama.cpp cannot parse it; check it is GBNF with a `root` rule, that every "
                    "rule it names is there, and that none begins with itself",
                    field="grammar",
                )
        if self._chain is not None and _penalises(sampling):
            for token in prompt[-_look_back(sampling, len(prompt)) :]:
                self._chain.accept(token)

    def sample(self, index: int) -> int:
        """The next token, from the logits of batch entry `index`."""
        logits = self._context.logits(index)
        if self._chain is None:
            token = self._biases.likeliest(logits)
            if np.isnan(logits[token]):  # argmax finds a NaN first
                raise NotANumber
            return token
        if np.isnan(logits[0]):  # NaN in one hidden value is NaN in every logit
            raise NotANumber
        if self._grammar is None:
            return self._chain.sample(self._context, index)
        return self._sample_in_grammar(logits, self._chain, self._grammar)

    def close(self) -> None:
        """Free the native samplers."""
        if self._chain is not None:
            self._chain.close()
        if self._grammar is not None:
            self._grammar.close()

    def _sample_in_grammar(self, logits: np.ndarray, chain: Chain, grammar: Grammar) -> int:
        """Sample freely and keep what the grammar allows; only else mask the whole vocabulary first."""
        token = chain.choose(logits)
        if not grammar.allows(token):
            token = chain.choose(grammar.masked(logits))
            if not grammar.allows(token):
                raise NoTokenAllowed
        chain.accept(token)
        grammar.accept(token)
        return token


def logprobs(context: Context, index: int, token: int, *, n_top: int) -> TokenLogprob:
    """The model's own log-probabilities (nats) at batch entry `index`, before any sampling stage."""
    logits = context.logits(index).astype(np.float64)
    peak = logits.max()
    normaliser = peak + np.log(np.exp(logits - peak).sum())
    top: list[tuple[int, bytes, float]] = []
    if n_top:
        likeliest = np.argpartition(-logits, n_top - 1)[:n_top]
        for each in likeliest[np.argsort(-logits[likeliest], kind="stable")].tolist():
            top.append((each, context.model.piece(each, special=True), float(logits[each] - normaliser)))
    piece = context.model.piece(token, special=True)
    return TokenLogprob(token, piece, float(logits[token] - normaliser), tuple(top))


class _Biases:
    """What a greedy choice adds to some logits, for the moment of choosing."""

    def __init__(self, biases: list[tuple[int, float]]) -> None:
        sums: dict[int, float] = {}
        for token, bias in biases:
            sums[token] = sums.get(token, 0.0) + _added(bias)
        self._only_bans = all(added <= 0 for added in sums.values())
        self._biased = frozenset(sums)
        self._tokens = np.fromiter(sums, np.intp, len(sums))
        self._added = np.fromiter(sums.values(), np.float32, len(sums))

    def likeliest(self, logits: np.ndarray) -> int:
        """The token of the highest biased logit, the first of equals; `logits` is left as it was."""
        token = int(logits.argmax())
        if self._only_bans and token not in self._biased:  # so of nearly every token
            return token
        own = logits[self._tokens]
        logits[self._tokens] = own + self._added
        token = int(logits.argmax())
        logits[self._tokens] = own
        return token


def _added(bias: float) -> float:
    """OpenAI's -100 means never."""
    return float("-inf") if bias <= -100 else bias


def _check_biases(biases: list[tuple[int, float]], n_vocab: int) -> None:
    for token, _ in biases:
        if token >= n_vocab:
            raise InvalidRequest(
                f"logit_bias: token {token} is not in the vocabulary of {n_vocab}", field="logit_bias"
            )


def _is_greedy(sampling: Sampling) -> bool:
    """Logits divided by less than this could overflow to infinity, and the draw would be of NaN."""
    return sampling.temperature < MIN_TEMPERATURE


def _penalises(sampling: Sampling) -> bool:
    penalties = sampling.repeat_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty
    return bool((penalties and sampling.repeat_last_n) or sampling.dry_multiplier)


def _look_back(sampling: Sampling, n_prompt: int) -> int:
    """Prompt tokens that the penalties see."""
    dry = 0
    if sampling.dry_multiplier:
        dry = n_prompt if sampling.dry_penalty_last_n is None else sampling.dry_penalty_last_n
    return max(1, min(n_prompt, max(dry, sampling.repeat_last_n)))


def _chain(context: Context, sampling: Sampling, biases: list[tuple[int, float]]) -> Chain:
    """llama.cpp's usual order: biases, penalties, DRY, then the cuts, temperature and the draw."""
    chain = Chain(context.model)
    if biases:
        chain.add_logit_bias([(token, _added(bias)) for token, bias in biases])
    if sampling.repeat_last_n:
        chain.add_penalties(
            last_n=sampling.repeat_last_n,
            repeat=sampling.repeat_penalty,
            frequency=sampling.frequency_penalty,
            presence=sampling.presence_penalty,
        )
    if sampling.dry_multiplier:
        last_n = sampling.dry_penalty_last_n
        chain.add_dry(
            multiplier=sampling.dry_multiplier,
            base=sampling.dry_base,
            allowed_length=sampling.dry_allowed_length,
            last_n=context.n_ctx if last_n is None else last_n,
            breakers=DRY_BREAKERS,
        )
    if _is_greedy(sampling):
        chain.add_greedy()
        return chain
    chain.add_cuts(
        top_k=sampling.top_k, typical_p=sampling.typical_p, top_p=sampling.top_p, min_p=sampling.min_p
    )
    seed = secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed % _SEEDS
    chain.add_draw(temperature=sampling.temperature, seed=seed)
    return chain
