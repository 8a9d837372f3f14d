"""llama.cpp's samplers: a chain that chooses a token, and a grammar that says which may come.

Owns the native objects and the memory they work on. Which samplers a request wants, and in which order,
is sampling.py's to say.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from engine.llama import Context, Handle, Model, native

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Chain(Handle):
    """Samplers in the order they are added."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        parameters = native.llama_sampler_chain_default_params()
        parameters.no_perf = True
        self._model = model
        self._chain: Any = native.llama_sampler_chain_init(parameters)
        self._stack.callback(native.llama_sampler_free, self._chain)

    def _add(self, sampler: Any) -> None:
        native.llama_sampler_chain_add(self._chain, sampler)

    def add_logit_bias(self, biases: Sequence[tuple[int, float]]) -> None:
        """(token, added logit); -inf bans."""
        array: Any = (native.llama_logit_bias * len(biases))(*biases)
        self._add(native.llama_sampler_init_logit_bias(self._model.n_vocab, len(biases), array))

    def add_penalties(self, *, last_n: int, repeat: float, frequency: float, presence: float) -> None:
        """Against tokens among the last `last_n` accepted ones."""
        n_vocab = self._model.n_vocab
        self._add(native.llama_sampler_init_penalties(n_vocab, last_n, repeat, frequency, presence))

    def add_dry(
        self, *, multiplier: float, base: float, allowed_length: int, last_n: int, breakers: Sequence[str]
    ) -> None:
        """Against repeating sequences; none is seen across a breaker."""
        array: Any = (ctypes.c_char_p * len(breakers))(*[breaker.encode() for breaker in breakers])
        vocab, n = self._model.vocab, len(breakers)
        self._add(native.llama_sampler_init_dry(vocab, multiplier, base, allowed_length, last_n, array, n))

    def add_cuts(self, *, top_k: int, typical_p: float, top_p: float, min_p: float) -> None:
        """The samplers that drop unlikely tokens, each only if it does anything."""
        if top_k > 0:
            self._add(native.llama_sampler_init_top_k(top_k))
        if typical_p < 1:
            self._add(native.llama_sampler_init_typical(typical_p, 1))
        if top_p < 1:
            self._add(native.llama_sampler_init_top_p(top_p, 1))
        if min_p > 0:
            self._add(native.llama_sampler_init_min_p(min_p, 1))

    def add_draw(self, *, temperature: float, seed: int) -> None:
        """Draw from what is left, at a temperature."""
        self._add(native.llama_sampler_init_temp(temperature))
        self._add(native.llama_sampler_init_dist(seed))

    def add_greedy(self) -> None:
        """Take the likeliest."""
        self._add(native.llama_sampler_init_greedy())

    def sample(self, context: Context, index: int) -> int:
        """Choose from the logits of batch entry `index`, and remember the choice."""
        return native.llama_sampler_sample(self._chain, context.pointer, index)

    def choose(self, logits: np.ndarray) -> int:
        """Choose from (n_vocab,) logits without remembering it."""
        return _Candidates.of_size(len(logits)).run(self._chain, logits).chosen

    def accept(self, token: int) -> None:
        """Remember a token: penalties look back on it."""
        native.llama_sampler_accept(self._chain, token)


class Grammar(Handle):
    """A GBNF grammar and how far the text has come in it."""

    def __init__(self, pointer: Any) -> None:
        super().__init__()
        self._pointer = pointer
        self._stack.callback(native.llama_sampler_free, pointer)

    @classmethod
    def parse(cls, model: Model, text: str) -> "Grammar | None":
        """None when llama.cpp cannot parse it. Check `grammar_problem` before: it crashes on some."""
        pointer = native.llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
        return cls(pointer) if pointer else None

    def allows(self, token: int) -> bool:
        """Whether the text may go on with this token."""
        candidates = _Candidates.of_size(1)
        candidates.values["id"] = token
        candidates.run(self._pointer, np.zeros(1, np.float32), reset_ids=False)
        return bool(np.isfinite(candidates.values["logit"][0]))

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """The logits with -inf at every token that the grammar forbids."""
        return _Candidates.of_size(len(logits)).run(self._pointer, logits).values["logit"].copy()

    def accept(self, token: int) -> None:
        """Go on with a token that `allows` would allow; any other ends the process."""
        native.llama_sampler_accept(self._pointer, token)


class _Candidates:
    """llama_token_data_array over numpy memory: one entry a token, in order of ids."""

    def __init__(self, size: int) -> None:
        self.values = np.zeros(size, _CANDIDATE)
        self._ids = np.arange(size, dtype=np.int32)
        data: Any = ctypes.cast(self.values.ctypes.data, native.llama_token_data_p)
        self._native = native.llama_token_data_array(data, size, -1, False)

    @staticmethod
    @lru_cache(maxsize=4)
    def of_size(size: int) -> "_Candidates":
        """One a vocabulary: the engine samples in one thread, one sequence after another."""
        return _Candidates(size)

    def run(self, sampler: Any, logits: np.ndarray, *, reset_ids: bool = True) -> "_Candidates":
        """Apply a sampler to these logits."""
        if reset_ids:
            self.values["id"] = self._ids
        self.values["logit"] = logits
        self._native.size, self._native.selected, self._native.sorted = len(logits), -1, False
        reference: Any = ctypes.byref(self._native)
        native.llama_sampler_apply(sampler, reference)
        return self

    @property
    def chosen(self) -> int:
        """The token that the last sampler selected."""
        return self._native.data[self._native.selected].id
