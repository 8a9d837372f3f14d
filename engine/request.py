"""What goes into the engine and what comes out: configuration, requests, events, errors.

Plain values that cross the process boundary. Nothing here knows llama.cpp, processes or asyncio.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from engine.grammar import grammar_problem

MAX_STOP_STRINGS = 32
MAX_STOP_CHARACTERS = 500
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_PROMPT_CHARACTERS = 32 * 2**20
MAX_SEQUENCES = 256  # LLAMA_MAX_SEQ
MOST_THREADS = 512  # GGML_MAX_N_THREADS: more end the process
MAX_POOLED_INPUTS = 2048

FinishReason = Literal["stop", "length", "cancelled"]
KVType = Literal["f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"]
Kind = Literal["text", "embedding", "rerank"]
Guesses = Literal["off", "lookup", "lookup and draft model"]  # of the next tokens, where they pay
Pooling = Literal["mean", "cls", "last", "rank"]  # how a sequence's tokens become one result
EMBEDDING_POOLINGS: tuple[Pooling, ...] = ("mean", "cls", "last")


class EngineError(Exception):
    """Base of everything the engine reports on purpose."""


class InvalidRequest(EngineError):
    """A field of the request that the engine refuses; `field` names it as `GenerationRequest` does."""

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class ContextOverflow(EngineError):
    """The prompt leaves no room for a single new token."""

    def __init__(self, n_prompt_tokens: int, n_ctx: int, *, at_least: bool = False) -> None:
        """`at_least`: so many were counted, and then no more."""
        counted = f"at least {n_prompt_tokens}" if at_least else str(n_prompt_tokens)
        super().__init__(
            f"the prompt has {counted} tokens but the context holds {n_ctx}, the answer included: "
            f"shorten the prompt or start the engine with a larger n_ctx"
        )
        self.n_prompt_tokens = n_prompt_tokens
        self.n_ctx = n_ctx
        self.at_least = at_least


class InputTooLong(InvalidRequest):
    """A text to embed or rank is longer than the model reads at once; `index` counts from 0."""

    def __init__(self, index: int, size: str, limit: str) -> None:
        super().__init__(f"input {index} has {size} and the model reads {limit}: split it", field="input")
        self.index = index
        self.size = size
        self.limit = limit


class QueueFull(EngineError):
    """More requests wait than the engine was told to hold."""

    def __init__(self, waiting: int, retry_after_s: float) -> None:
        super().__init__(f"{waiting} requests are waiting already: try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class EngineRestarted(EngineError):
    """The process died while this request ran, and it could not be replayed, or was and died again."""


class EngineUnavailable(EngineError):
    """The process cannot be started or was closed."""


class ModelLoadFailed(EngineError):
    """llama.cpp refused the model, the adapter or the context; the message carries its reason."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. temperature 0 is greedy; a value that disables is named at each field."""

    temperature: float = 0.8  # 0..100
    top_k: int = 40  # 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    typical_p: float = 1.0  # 1: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # tokens that the three penalties look back on; 0: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2  # tokens
    dry_penalty_last_n: int | None = None  # tokens; None: the whole context
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, added logit); -100 and below bans
    seed: int | None = None  # None: a fresh one
    grammar: str | None = None  # GBNF

    def validate(self) -> None:
        """Raise InvalidRequest for the first field out of range."""
        _within("temperature", self.temperature, 0, 100)
        _whole("top_k", self.top_k, 0, 2**31 - 1)
        _within("top_p", self.top_p, 0, 1)
        _within("min_p", self.min_p, 0, 1)
        _within("typical_p", self.typical_p, 0, 1)
        _within("repeat_penalty", self.repeat_penalty, 0.01, 100)
        _whole("repeat_last_n", self.repeat_last_n, 0, 2**20)
        _within("presence_penalty", self.presence_penalty, -100, 100)
        _within("frequency_penalty", self.frequency_penalty, -100, 100)
        _within("dry_multiplier", self.dry_multiplier, 0, 100)
        _within("dry_base", self.dry_base, 1, 100)
        _whole("dry_allowed_length", self.dry_allowed_length, 1, 2**20)
        if self.dry_penalty_last_n is not None:
            _whole("dry_penalty_last_n", self.dry_penalty_last_n, 0, 2**20)
        if self.seed is not None:
            _whole("seed", self.seed, -(2**63), 2**63 - 1)
        self._validate_biases()
        if self.grammar is not None:
            check_text("grammar", self.grammar)
            if problem := grammar_problem(self.grammar):
                raise InvalidRequest(f"grammar: {problem}", field="grammar")

    def _validate_biases(self) -> None:
        if len(self.logit_bias) > MAX_LOGIT_BIASES:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIASES} are taken",
                field="logit_bias",
            )
        for token, bias in self.logit_bias:
            if not _is_token(token):
                raise InvalidRequest(f"logit_bias: {token!r} is not a token id", field="logit_bias")
            if not _is_number(bias) or not (math.isfinite(bias) or bias == -math.inf):
                raise InvalidRequest(
                    f"logit_bias of token {token} is {bias!r}; give a number, -100 to ban it",
                    field="logit_bias",
                )


@dataclass(frozen=True, slots=True)
class Tenant:
    """On whose behalf a request runs. Requests of one name share one account of served tokens."""

    name: str = ""
    weight: float = 1.0  # of two that want more than there is, weight 3 gets three times as much as 1
    priority: int = 0  # whoever has more goes first, whatever the weights
    max_running: int | None = None  # sequences decoded at once; None: no limit but the engine's

    def validate(self) -> None:
        """Raise InvalidRequest for the first field out of range."""
        check_text("tenant name", self.name)
        _within("tenant weight", self.weight, 0.01, 1000)
        _whole("tenant priority", self.priority, -1000, 1000)
        if self.max_running is not None:
            _whole("tenant max_running", self.max_running, 1, MAX_SEQUENCES)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One continuation to write. A text prompt is tokenised by the engine; tokens are taken as they are."""

    prompt: str | tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None  # None: until the context is full
    stop: tuple[str, ...] = ()  # the text ends before the first of these; it is not part of the answer
    logprobs: int | None = None  # None: none; 0: of the chosen token; n: and of the n likeliest, up to 20
    ignore_eos: bool = False  # the model cannot end the text; only max_tokens and stop do
    add_special: bool = True  # BOS (and EOS) as the model asks for; text prompts only
    parse_special: bool = False  # special tokens in the text become those tokens; text prompts only
    tenant: Tenant = Tenant()
    cache_salt: str = ""  # cached prefixes are shared among requests of one salt only
    adapters: tuple[tuple[str, float], ...] = ()  # (name in EngineConfig.adapters, scale)
    replayable: bool = False  # nothing is passed on before the end: it may begin anew (Delta.anew)

    def validate(self) -> None:
        """Raise InvalidRequest for the first field out of range."""
        self.sampling.validate()
        self.tenant.validate()
        check_text("cache_salt", self.cache_salt)
        for name, scale in self.adapters:
            _within(f"scale of adapter {name!r}", scale, -100, 100)
        self._validate_prompt()
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1, 2**31 - 1)
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        for name in ("ignore_eos", "add_special", "parse_special", "replayable"):
            if not isinstance(value := getattr(self, name), bool):
                raise InvalidRequest(f"{name} is {value!r}; give true or false", field=name)
        self._validate_stop()
        if self.ignore_eos and self.sampling.grammar is not None:
            raise InvalidRequest(
                "ignore_eos cannot hold beside a grammar, which ends the text", field="ignore_eos"
            )

    def _validate_stop(self) -> None:
        if not isinstance(self.stop, tuple | list) or len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(f"stop takes a list of at most {MAX_STOP_STRINGS} strings", field="stop")
        for text in self.stop:
            if not isinstance(text, str):
                raise InvalidRequest(f"stop holds {text!r}; give strings", field="stop")
            if not 0 < len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidRequest(
                    f"a stop string has {len(text)} characters; give 1 to {MAX_STOP_CHARACTERS}", field="stop"
                )

    def _validate_prompt(self) -> None:
        if isinstance(self.prompt, tuple | list):
            if not self.prompt:
                raise InvalidRequest("the prompt has no tokens: give at least one", field="prompt")
            if (wrong := next((t for t in self.prompt if not _is_token(t)), None)) is not None:
                raise InvalidRequest(f"the prompt holds {wrong!r}, which is no token id", field="prompt")
            return
        check_text("prompt", self.prompt)
        if len(self.prompt) > MAX_PROMPT_CHARACTERS:
            raise InvalidRequest(
                f"the prompt has {len(self.prompt)} characters; at most {MAX_PROMPT_CHARACTERS} are read",
                field="prompt",
            )


@dataclass(frozen=True, slots=True)
class PooledRequest:
    """Texts of which a model makes one result each: an embedding, or with a `query` a score.

    Each text is a sequence: `tenant.max_running` counts those of one call.
    """

    inputs: tuple[str, ...]
    query: str | None = None
    tenant: Tenant = Tenant()

    def validate(self) -> None:
        """Raise InvalidRequest for the first field that cannot be read."""
        self.tenant.validate()
        if not isinstance(self.inputs, tuple | list) or not 0 < len(self.inputs) <= MAX_POOLED_INPUTS:
            raise InvalidRequest(f"give 1 to {MAX_POOLED_INPUTS} texts in a list", field="input")
        for index, text in enumerate(self.inputs):
            check_text(f"input {index}", text)
            if not text:
                raise InvalidRequest(f"input {index} is empty: give at least one character", field="input")
        if self.query is not None:
            check_text("query", self.query)
            if not self.query:
                raise InvalidRequest("the query is empty: give at least one character", field="query")


class TokenLogprob(NamedTuple):
    """Natural logarithms of the model's own probabilities, before any sampling stage."""

    token: int
    text_bytes: bytes
    logprob: float
    top: tuple[tuple[int, bytes, float], ...]  # likeliest first


class Delta(NamedTuple):
    """What one step or several added.

    `text` may lag behind `tokens`: it waits for whole characters and stop strings.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    n_prompt_tokens: int = 0  # told with the first one: who is cut off is counted too
    anew: bool = False  # what came before is void: the process died, and a replayable request begins again

    def joined(self, later: "Delta") -> "Delta":
        """This and the next one as one."""
        return Delta(
            self.text + later.text,
            self.tokens + later.tokens,
            self.logprobs + later.logprobs,
            self.n_prompt_tokens,
        )


@dataclass(frozen=True, slots=True)
class Done:
    """The last event of a request."""

    finish_reason: FinishReason
    n_prompt_tokens: int
    n_completion_tokens: int  # tokens the model wrote, the ending one included
    n_cached_tokens: int = 0  # prompt tokens that were in the cache already
    stop_string: str | None = None  # the one that ended the text
    stop_token: int | None = None  # the end-of-generation token that ended it; in no Delta
    prefill_s: float = 0.0  # from admission to the first token
    decode_s: float = 0.0  # from the first token to the last


Event = Delta | Done


class Read(NamedTuple):
    """What one call read for a PooledRequest that goes on after it."""

    n_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Pooled:
    """All that a PooledRequest gives, in the order of its inputs."""

    values: np.ndarray  # float32: (inputs, width) embeddings of length 1, or (inputs,) scores
    n_tokens: int  # that were read


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How to load a model and how much it may serve at once."""

    model_path: Path
    kind: Kind = "text"
    pooling: Pooling | None = None  # of an embedding model; None: as its file says
    n_ctx: int = 4096  # tokens one request may use, answer included; of one text, for an embedding
    n_parallel: int = 4  # sequences decoded together
    kv_cells: int | None = None  # tokens of all sequences together; None: n_ctx * n_parallel
    n_threads: int | None = None  # None: physical cores that this process may use
    n_gpu_layers: int | None = None  # the output head is one; None: all, if the build has a GPU backend
    use_mmap: bool | None = None  # weights stay in the file's pages; None: when memory is short (memory.py)
    n_batch: int = 512  # tokens of one prefill chunk
    kv_type_k: KVType = "f16"
    kv_type_v: KVType = "f16"
    lora: tuple[tuple[Path, float], ...] = ()  # (GGUF adapter, scale), applied to every request
    adapters: tuple[tuple[str, Path], ...] = ()  # (name, GGUF adapter): loaded beside, used by who names them
    max_queue: int = 256  # requests that may wait beyond n_parallel
    max_stall_ms: int = 250  # running streams wait this long at most for a step that computes prompts
    cache_ram_mb: int = 512  # MiB of prefixes kept in host memory, beside the KV cache; 0: none
    cache_disk_mb: int = 0  # MiB of prefixes kept in cache_folder over restarts; 0: none
    cache_folder: Path | None = None
    speculation: Literal["auto", "off"] = "auto"  # drafts of the next tokens, where measured to pay
    draft_model: Path | None = (
        None  # a small GGUF of the same vocabulary that drafts; None: prompt lookup only
    )

    def validate(self) -> None:
        """Raise InvalidRequest for the first field out of range."""
        self._validate_kind()
        _whole("n_ctx", self.n_ctx, 16, 2**24)
        _whole("n_parallel", self.n_parallel, 1, MAX_SEQUENCES)
        self._validate_cache()
        if self.n_threads is not None:
            _whole("n_threads", self.n_threads, 1, MOST_THREADS)
        if self.n_gpu_layers is not None:
            _whole("n_gpu_layers", self.n_gpu_layers, 0, 10_000)
        if self.use_mmap not in (None, True, False):
            raise InvalidRequest(f"use_mmap is {self.use_mmap!r}; give true or false", field="use_mmap")
        _whole("n_batch", self.n_batch, 1, 2**16)
        _whole("max_queue", self.max_queue, 0, 2**20)
        for name, kind in (("kv_type_k", self.kv_type_k), ("kv_type_v", self.kv_type_v)):
            if kind not in get_args(KVType):
                known = ", ".join(get_args(KVType))
                raise InvalidRequest(f"{name} is {kind!r}; give one of {known}", field=name)
        for path, scale in self.lora:
            _within(f"lora scale of {path}", scale, -100, 100)
        if self.speculation not in ("auto", "off"):
            raise InvalidRequest(
                f"speculation is {self.speculation!r}; give auto or off", field="speculation"
            )

    def _validate_kind(self) -> None:
        if self.kind not in get_args(Kind):
            raise InvalidRequest(
                f"kind is {self.kind!r}; give one of {', '.join(get_args(Kind))}", field="kind"
            )
        if self.pooling is not None and (self.kind != "embedding" or self.pooling not in EMBEDDING_POOLINGS):
            raise InvalidRequest(
                f"pooling is {self.pooling!r} of a model of kind {self.kind}; an embedding model takes "
                f"{', '.join(EMBEDDING_POOLINGS)}",
                field="pooling",
            )
        if self.kind != "text" and (self.lora or self.adapters):
            raise InvalidRequest("adapters are for models that write text", field="lora")

    def _validate_cache(self) -> None:
        if self.kv_cells is not None:
            _whole("kv_cells", self.kv_cells, 16, 2**31 - 1)
            if self.kv_cells < self.n_ctx:
                raise InvalidRequest(
                    f"kv_cells is {self.kv_cells}, less than one request may use: give n_ctx ({self.n_ctx}) "
                    "or more, or lower n_ctx",
                    field="kv_cells",
                )
        _whole("max_stall_ms", self.max_stall_ms, 10, 60_000)
        _whole("cache_ram_mb", self.cache_ram_mb, 0, 2**24)
        _whole("cache_disk_mb", self.cache_disk_mb, 0, 2**24)
        if self.cache_disk_mb and self.cache_folder is None:
            raise InvalidRequest("cache_disk_mb needs a cache_folder to keep them in", field="cache_folder")


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What the loaded model is and how it was loaded."""

    n_ctx: int  # tokens per sequence
    n_parallel: int
    n_ctx_train: int
    n_vocab: int
    n_embd: int
    n_params: int
    size_bytes: int
    architecture: str
    description: str  # llama.cpp's own, such as "llama 135M Q4_1"
    chat_template: str | None
    bos_token: str  # text; "" when the model has none
    eos_token: str
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    add_bos: bool
    gpu: str | None  # device name; None: everything runs on the CPU
    n_threads: int
    slow_attention: str | None = None  # why llama.cpp's own kernel runs on the CPU; None: ours does
    pooling: Pooling | None = None  # of a model that does not write text
    unified: bool = False  # one KV memory that all sequences share; else each has a stream of its own
    shares_prefixes: bool = False  # whether a request can begin with what another one computed
    guesses: Guesses = "off"
    flash_attention: bool | None = None  # None: llama.cpp did not say
    kernels: tuple[str, ...] = ()  # of our own that the CPU computes with: "attention", "weights"
    n_layers: int = 0  # with the output head, as GPU layers are counted
    n_gpu_layers: int = 0  # of them, on the GPU


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _within(name: str, value: Any, low: float, high: float) -> None:
    if not (_is_number(value) and low <= value <= high):  # NaN fails every comparison
        raise InvalidRequest(f"{name} is {value!r}; give a number from {low} to {high}", field=name)


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not (isinstance(value, int) and _is_number(value) and low <= value <= high):
        raise InvalidRequest(f"{name} is {value!r}; give a whole number from {low} to {high}", field=name)


def check_text(name: str, value: Any) -> None:
    """Raise InvalidRequest for what no C string of UTF-8 can be made of."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is of type {type(value).__name__}; give a text", field=name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequest(f"the {name} holds a lone surrogate: send valid Unicode", field=name) from None
