"""One sampler chain a sequence, built of llama.cpp's own samplers, and log-probabilities of what was chosen.

Plain greedy sampling takes the shortest way: an argmax over the logits, no chain at all.
"""

import secrets

import numpy as np

from engine.llama import Chain, Context, Grammar
from engine.request import InvalidRequest, Sampling, TokenLogprob

DRY_BREAKERS = ("\n", ":", '"', "*")
_SEEDS = 2**32 - 1  # llama.cpp keeps the largest 32-bit value to mean "choose one"


class Sampler:
    """Chooses the next tokens of one sequence; `prompt` is what penalties look back on at first."""

    def __init__(
        self, context: Context, sampling: Sampling, *, prompt: tuple[int, ...], ignore_eos: bool = False
    ) -> None:
        self._context = context
        biases = list(sampling.logit_bias)
        if ignore_eos:
            biases += [(token, float("-inf")) for token in sorted(context.model.eog_tokens)]
        self._grammar = _grammar(context, sampling.grammar)
        self._is_plain_greedy = (
            sampling.temperature == 0 and not biases and self._grammar is None and not _penalises(sampling)
        )
        self._chain = None if self._is_plain_greedy else _chain(context, sampling, biases)
        if self._chain is not None and _penalises(sampling):
            for token in prompt[-_look_back(sampling, len(prompt)) :]:
                self._chain.accept(token)

    def sample(self, index: int) -> int:
        """The next token, from the logits of batch entry `index`."""
        if self._chain is None:
            return int(self._context.logits(index).argmax())
        if self._grammar is None:
            return self._chain.sample(self._context, index)
        return self._sample_in_grammar(index, self._chain, self._grammar)

    def close(self) -> None:
        """Free the native samplers."""
        if self._chain is not None:
            self._chain.close()
        if self._grammar is not None:
            self._grammar.close()

    def _sample_in_grammar(self, index: int, chain: Chain, grammar: Grammar) -> int:
        """Sample freely and keep what the grammar allows; only else mask the whole vocabulary first."""
        logits = self._context.logits(index)
        token = chain.choose(logits)
        if not grammar.allows(token):
            token = chain.choose(grammar.masked(logits))
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


def _grammar(context: Context, text: str | None) -> Grammar | None:
    if text is None:
        return None
    grammar = Grammar.parse(context.model, text)
    if grammar is None:
        raise InvalidRequest(
            "grammar: llama.cpp cannot parse it; check it is GBNF with a `root` rule", field="grammar"
        )
    return grammar


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
    n_vocab = context.model.n_vocab
    for token, _ in biases:
        if token >= n_vocab:
            chain.close()
            raise InvalidRequest(
                f"logit_bias: token {token} is not in the vocabulary of {n_vocab}", field="logit_bias"
            )
    if biases:
        chain.add_logit_bias([(t, float("-inf") if bias <= -100 else bias) for t, bias in biases])
    if sampling.repeat_last_n:
        chain.add_penalties(
            sampling.repeat_last_n,
            sampling.repeat_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
    if sampling.dry_multiplier:
        last_n = -1 if sampling.dry_penalty_last_n is None else sampling.dry_penalty_last_n
        if last_n < 0:
            last_n = context.n_ctx
        chain.add_dry(
            sampling.dry_multiplier, sampling.dry_base, sampling.dry_allowed_length, last_n, DRY_BREAKERS
        )
    if sampling.temperature == 0:
        chain.add_greedy()
        return chain
    chain.add_cuts(
        top_k=sampling.top_k, typical_p=sampling.typical_p, top_p=sampling.top_p, min_p=sampling.min_p
    )
    chain.add_temperature(sampling.temperature)
    chain.add_draw(secrets.randbelow(_SEEDS) if sampling.seed is None else sampling.seed % _SEEDS)
    return chain
