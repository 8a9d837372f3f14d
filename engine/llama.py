"""The only file that imports llama_cpp for inference: model, context, batch, KV memory, adapters.

Every native handle is a context manager with one owner, and is freed in reverse order of its making. Nothing
here schedules, samples or knows requests. Tokens are plain ints, positions count from 0 within a sequence.
"""

import ctypes
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType

import numpy as np
from llama_cpp import _ggml as ggml_library
from llama_cpp import llama_cpp as native

from engine.request import EngineError, KVType, ModelLoadFailed
from engine.tensor import Tensor, TensorView

KV_TYPES: dict[KVType, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}
_ERROR_LEVELS = (3, 4)  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
_LOG_LINES_KEPT = 40


class DecodeFailed(EngineError):
    """llama_decode did not finish. `status`: 1 no room in the KV cache, 2 aborted, negative an error."""

    def __init__(self, status: int) -> None:
        reason = {1: "no room in the KV cache", 2: "aborted", -1: "the batch is invalid"}
        super().__init__(f"llama.cpp could not decode: {reason.get(status, f'internal error {status}')}")
        self.status = status


class _Log:
    """llama.cpp's own warnings and errors, kept instead of printed; one a process."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._lock = threading.Lock()
        self._callback = native.llama_log_callback(self._take)
        self._started = False

    def start(self) -> None:
        """Take over llama.cpp's log and initialise its backends, once."""
        with self._lock:
            if not self._started:
                native.llama_log_set(self._callback, ctypes.c_void_p(0))
                native.llama_backend_init()
                self._started = True

    def _take(self, level: int, text: bytes, _data: object) -> None:
        if level in _ERROR_LEVELS and text.strip(b".\n "):
            self.lines.append(text.decode("utf-8", "replace").strip())
            del self.lines[:-_LOG_LINES_KEPT]

    def reason(self) -> str:
        """What llama.cpp said last, for an error message."""
        said = [line for line in self.lines if line][-3:]
        return "; ".join(said) or "llama.cpp gave no reason"


_log = _Log()


def gpu_name() -> str | None:
    """The first GPU that this build of llama.cpp can offload to; None when there is none."""
    _log.start()
    if not native.llama_supports_gpu_offload():
        return None
    library = ggml_library.libggml
    library.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    library.ggml_backend_dev_description.restype = ctypes.c_char_p
    library.ggml_backend_dev_description.argtypes = [ctypes.c_void_p]
    device = library.ggml_backend_dev_by_type(1)  # GGML_BACKEND_DEVICE_TYPE_GPU
    return library.ggml_backend_dev_description(device).decode() if device else None


class _Handle:
    """A native object that is freed once, by `close` or at the end of a `with` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def close(self) -> None:
        self._stack.close()

    def __enter__(self):
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Model(_Handle):
    """A loaded GGUF and its vocabulary; read-only, shared by any number of contexts."""

    def __init__(self, pointer: int, path: Path) -> None:
        super().__init__()
        self.pointer = pointer
        self.path = path
        self._stack.callback(native.llama_model_free, pointer)
        self.vocab = native.llama_model_get_vocab(pointer)
        self._eog: dict[int, bool] = {}

    @classmethod
    def open(
        cls, path: Path, *, n_gpu_layers: int | None = None, use_mmap: bool = True, vocab_only: bool = False
    ) -> "Model":
        """Load a GGUF whose header was checked before. Raises ModelLoadFailed with llama.cpp's reason."""
        _log.start()
        _log.lines.clear()
        parameters = native.llama_model_default_params()
        parameters.n_gpu_layers = 999 if n_gpu_layers is None else n_gpu_layers
        parameters.load_mode = native.LLAMA_LOAD_MODE_MMAP if use_mmap else native.LLAMA_LOAD_MODE_NONE
        parameters.vocab_only = vocab_only
        pointer = native.llama_model_load_from_file(str(path).encode(), parameters)
        if not pointer:
            raise ModelLoadFailed(f"{path}: {_log.reason()}")
        return cls(pointer, path)

    @cached_property
    def metadata(self) -> dict[str, str]:
        """Scalar metadata as llama.cpp prints it; arrays are left out."""
        buffer = ctypes.create_string_buffer(1 << 20)
        result = {}
        for index in range(native.llama_model_meta_count(self.pointer)):
            native.llama_model_meta_key_by_index(self.pointer, index, buffer, len(buffer))
            key = buffer.value.decode("utf-8", "replace")
            native.llama_model_meta_val_str_by_index(self.pointer, index, buffer, len(buffer))
            result[key] = buffer.value.decode("utf-8", "replace")
        return result

    @cached_property
    def n_vocab(self) -> int:
        return native.llama_vocab_n_tokens(self.vocab)

    @cached_property
    def n_embd(self) -> int:
        return native.llama_model_n_embd(self.pointer)

    @cached_property
    def n_layer(self) -> int:
        return native.llama_model_n_layer(self.pointer)

    @cached_property
    def n_ctx_train(self) -> int:
        return native.llama_model_n_ctx_train(self.pointer)

    @cached_property
    def n_params(self) -> int:
        return native.llama_model_n_params(self.pointer)

    @cached_property
    def size_bytes(self) -> int:
        return native.llama_model_size(self.pointer)

    @cached_property
    def description(self) -> str:
        buffer = ctypes.create_string_buffer(256)
        native.llama_model_desc(self.pointer, buffer, len(buffer))
        return buffer.value.decode("utf-8", "replace")

    @cached_property
    def chat_template(self) -> str | None:
        template = native.llama_model_chat_template(self.pointer, None)
        return template.decode("utf-8") if template else None

    @property
    def bos_id(self) -> int | None:
        return _token_or_none(native.llama_vocab_bos(self.vocab))

    @property
    def eos_id(self) -> int | None:
        return _token_or_none(native.llama_vocab_eos(self.vocab))

    @property
    def eot_id(self) -> int | None:
        return _token_or_none(native.llama_vocab_eot(self.vocab))

    @property
    def adds_bos(self) -> bool:
        return native.llama_vocab_get_add_bos(self.vocab)

    @cached_property
    def eog_tokens(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return frozenset(t for t in range(self.n_vocab) if native.llama_vocab_is_eog(self.vocab, t))

    def is_eog(self, token: int) -> bool:
        return token in self.eog_tokens

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids; `parse_special` turns the text of special tokens into those tokens."""
        data = text.encode() if isinstance(text, str) else text
        room = len(data) + 8
        tokens = (native.llama_token * room)()
        count = native.llama_tokenize(self.vocab, data, len(data), tokens, room, add_special, parse_special)
        if count < 0:
            tokens = (native.llama_token * -count)()
            count = native.llama_tokenize(
                self.vocab, data, len(data), tokens, -count, add_special, parse_special
            )
        return tokens[:count]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; special tokens are empty unless asked for. Maybe half a character."""
        buffer = ctypes.create_string_buffer(64)
        count = native.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = native.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:count]

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of a whole token sequence."""
        return b"".join(self.piece(t, special=special) for t in tokens).decode("utf-8", "replace")

    def token_text(self, token: int | None) -> str:
        """How the vocabulary writes a token, such as "<|im_end|>"; "" for None."""
        return "" if token is None else native.llama_vocab_get_text(self.vocab, token).decode("utf-8")


def _token_or_none(token: int) -> int | None:
    return None if token < 0 else token


class Context(_Handle):
    """A KV memory over a model, and the one batch that is decoded into it. Not thread-safe."""

    def __init__(self, pointer: int, model: Model, *, n_batch: int, keep_alive: Iterable[object]) -> None:
        super().__init__()
        self.pointer = pointer
        self.model = model
        self.n_batch = n_batch
        self._keep_alive = tuple(keep_alive)
        self._stack.callback(native.llama_free, pointer)
        self.memory = native.llama_get_memory(pointer)
        self.n_ctx: int = native.llama_n_ctx(pointer)
        self.n_threads: int = native.llama_n_threads(pointer)
        self.batch = Batch(n_batch)
        self._stack.callback(self.batch.close)

    @classmethod
    def open(
        cls,
        model: Model,
        *,
        n_ctx: int,
        n_batch: int = 512,
        n_seq_max: int = 1,
        n_threads: int | None = None,
        type_k: KVType = "f16",
        type_v: KVType = "f16",
        n_outputs_max: int | None = None,
        wants_tensor: Callable[[Tensor], bool] | None = None,
        on_tensor: Callable[[TensorView], None] | None = None,
    ) -> "Context":
        """A context of `n_ctx` cells, unified over `n_seq_max` sequences.

        `on_tensor` sees each computed tensor that `wants_tensor` picked. Raises ModelLoadFailed.
        """
        _log.lines.clear()
        parameters = native.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = n_batch
        parameters.n_seq_max = n_seq_max
        parameters.n_outputs_max = n_outputs_max or 0
        parameters.n_threads = parameters.n_threads_batch = n_threads or default_threads()
        parameters.type_k, parameters.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        parameters.kv_unified = True
        parameters.no_perf = True
        keep: list[object] = []
        if on_tensor is not None:
            keep.append(_eval_callback(wants_tensor or (lambda _: True), on_tensor))
            parameters.cb_eval = keep[0]
        pointer = native.llama_init_from_model(model.pointer, parameters)
        if not pointer:
            raise ModelLoadFailed(f"{model.path}: no context of {n_ctx} tokens: {_log.reason()}")
        return cls(pointer, model, n_batch=n_batch, keep_alive=keep)

    def decode(self) -> None:
        """Run what lies in `batch`. Raises DecodeFailed; the KV memory is then as it was before."""
        status = native.llama_decode(self.pointer, self.batch.native)
        if status != 0:
            raise DecodeFailed(status)

    def logits(self, index: int) -> np.ndarray:
        """A view of the (n_vocab,) float32 logits of batch entry `index`, valid until the next decode."""
        pointer = native.llama_get_logits_ith(self.pointer, index)
        if not pointer:
            raise IndexError(f"batch entry {index} was not flagged as an output")
        return np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,))

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> None:
        """Forget positions [start, end) of a sequence; -1 means to its end."""
        native.llama_memory_seq_rm(self.memory, sequence, start, end)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let `target` share the cells of `source` at positions [start, end); costs no memory."""
        native.llama_memory_seq_cp(self.memory, source, target, start, end)

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds."""
        return native.llama_memory_seq_pos_max(self.memory, sequence) + 1

    @property
    def can_share_prefixes(self) -> bool:
        """False for recurrent and sliding-window memories, whose prefixes cannot be cut out again."""
        model = self.model.pointer
        recurrent = native.llama_model_is_recurrent(model) or native.llama_model_is_hybrid(model)
        return not recurrent and native.llama_model_n_swa(model) == 0

    def clear(self) -> None:
        """Forget everything."""
        native.llama_memory_clear(self.memory, False)

    def apply(self, adapters: Sequence[tuple["Adapter", float]]) -> None:
        """Use these LoRA adapters, and only these, from the next decode on."""
        pointers = (ctypes.c_void_p * len(adapters))(*[adapter.pointer for adapter, _ in adapters])
        scales = (ctypes.c_float * len(adapters))(*[scale for _, scale in adapters])
        kind = ctypes.POINTER(ctypes.c_void_p)
        if native.llama_set_adapters_lora(self.pointer, ctypes.cast(pointers, kind), len(adapters), scales):
            raise ModelLoadFailed(f"the LoRA adapters cannot be applied together: {_log.reason()}")


class Adapter:
    """A LoRA adapter in llama.cpp's GGUF form; freed together with its model."""

    def __init__(self, model: Model, path: Path) -> None:
        _log.lines.clear()
        self.pointer = native.llama_adapter_lora_init(model.pointer, str(path).encode())
        if not self.pointer:
            raise ModelLoadFailed(f"{path}: the adapter does not fit {model.path.name}: {_log.reason()}")


class Batch:
    """Tokens of one decode call, filled in place; at most one sequence an entry."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.native = native.llama_batch_init(capacity, 0, 1)
        self._token, self._pos = self.native.token, self.native.pos
        self._seq_id, self._n_seq_id, self._logits = (
            self.native.seq_id,
            self.native.n_seq_id,
            self.native.logits,
        )
        for index in range(capacity):
            self._n_seq_id[index] = 1

    def __len__(self) -> int:
        return self.native.n_tokens

    def clear(self) -> None:
        self.native.n_tokens = 0

    def add(self, token: int, position: int, sequence: int, *, output: bool) -> int:
        """Append one token; returns its index, under which its logits are found if `output`."""
        index = self.native.n_tokens
        self._token[index] = token
        self._pos[index] = position
        self._seq_id[index][0] = sequence
        self._logits[index] = output
        self.native.n_tokens = index + 1
        return index

    def close(self) -> None:
        native.llama_batch_free(self.native)


class Chain(_Handle):
    """A chain of llama.cpp's samplers, in the order they are added."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        parameters = native.llama_sampler_chain_default_params()
        parameters.no_perf = True
        self._model = model
        self._chain = native.llama_sampler_chain_init(parameters)
        self._stack.callback(native.llama_sampler_free, self._chain)

    def _add(self, sampler: int) -> None:
        native.llama_sampler_chain_add(self._chain, sampler)

    def add_logit_bias(self, biases: Sequence[tuple[int, float]]) -> None:
        array = (native.llama_logit_bias * len(biases))(*biases)
        self._add(native.llama_sampler_init_logit_bias(self._model.n_vocab, len(biases), array))

    def add_penalties(self, last_n: int, repeat: float, frequency: float, presence: float) -> None:
        n_vocab = self._model.n_vocab
        self._add(native.llama_sampler_init_penalties(n_vocab, last_n, repeat, frequency, presence))

    def add_dry(
        self, multiplier: float, base: float, allowed_length: int, last_n: int, breakers: Sequence[str]
    ) -> None:
        array = (ctypes.c_char_p * len(breakers))(*[breaker.encode() for breaker in breakers])
        vocab = self._model.vocab
        self._add(
            native.llama_sampler_init_dry(
                vocab, multiplier, base, allowed_length, last_n, array, len(breakers)
            )
        )

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

    def add_temperature(self, temperature: float) -> None:
        self._add(native.llama_sampler_init_temp(temperature))

    def add_draw(self, seed: int) -> None:
        self._add(native.llama_sampler_init_dist(seed))

    def add_greedy(self) -> None:
        self._add(native.llama_sampler_init_greedy())

    def sample(self, context: Context, index: int) -> int:
        """Choose from the logits of batch entry `index`, and remember the choice."""
        return native.llama_sampler_sample(self._chain, context.pointer, index)

    def choose(self, logits: np.ndarray) -> int:
        """Choose from (n_vocab,) logits without remembering it."""
        candidates = Candidates(logits)
        native.llama_sampler_apply(self._chain, ctypes.byref(candidates.native))
        return candidates.chosen

    def accept(self, token: int) -> None:
        """Remember a token: penalties look back on it."""
        native.llama_sampler_accept(self._chain, token)


class Grammar(_Handle):
    """A GBNF grammar and how far the text has come in it."""

    def __init__(self, pointer: int) -> None:
        super().__init__()
        self._pointer = pointer
        self._stack.callback(native.llama_sampler_free, pointer)

    @classmethod
    def parse(cls, model: Model, text: str) -> "Grammar | None":
        """None when llama.cpp cannot parse it. Check nesting before: deep nesting crashes the parser."""
        pointer = native.llama_sampler_init_grammar(model.vocab, text.encode(), b"root")
        return cls(pointer) if pointer else None

    def allows(self, token: int) -> bool:
        """Whether the text may go on with this token."""
        candidates = Candidates(np.zeros(1, np.float32), first=token)
        native.llama_sampler_apply(self._pointer, ctypes.byref(candidates.native))
        return bool(np.isfinite(candidates.values["logit"][0]))

    def masked(self, logits: np.ndarray) -> np.ndarray:
        """The logits with -inf at every token that the grammar forbids."""
        candidates = Candidates(logits)
        native.llama_sampler_apply(self._pointer, ctypes.byref(candidates.native))
        return candidates.values["logit"].copy()

    def accept(self, token: int) -> None:
        native.llama_sampler_accept(self._pointer, token)


class Candidates:
    """llama_token_data_array over numpy memory: one entry a token, in order of ids from `first`."""

    def __init__(self, logits: np.ndarray, *, first: int = 0) -> None:
        self.values = np.empty(len(logits), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self.values["id"] = np.arange(first, first + len(logits))
        self.values["logit"] = logits
        self.values["p"] = 0
        data = ctypes.cast(self.values.ctypes.data, native.llama_token_data_p)
        self.native = native.llama_token_data_array(data, len(logits), -1, False)

    @property
    def chosen(self) -> int:
        """The token that the last sampler selected."""
        return self.native.data[self.native.selected].id


def default_threads() -> int:
    """Physical cores that this process may run on."""
    import psutil

    physical = psutil.cpu_count(logical=False) or 1
    return max(1, min(physical, len(psutil.Process().cpu_affinity() or [0] * physical)))


def evaluate(context: Context, tokens: Sequence[int]) -> np.ndarray:
    """(len(tokens), n_vocab) float32 logits of one sequence, from an empty KV memory, by chunks of n_batch."""
    if len(tokens) > context.n_ctx:
        raise ValueError(f"{len(tokens)} tokens do not fit a context of {context.n_ctx}")
    context.clear()
    result = np.empty((len(tokens), context.model.n_vocab), np.float32)
    for start in range(0, len(tokens), context.n_batch):
        chunk = tokens[start : start + context.n_batch]
        context.batch.clear()
        for offset, token in enumerate(chunk):
            context.batch.add(token, start + offset, 0, output=True)
        context.decode()
        pointer = native.llama_get_logits(context.pointer)
        rows = np.ctypeslib.as_array(pointer, shape=(len(chunk), context.model.n_vocab))
        result[start : start + len(chunk)] = rows
    context.clear()
    return result


def _eval_callback(wants: Callable[[Tensor], bool], seen: Callable[[TensorView], None]) -> object:
    """llama.cpp asks for every node of the graph (`ask`), then hands over those that were wanted."""

    def callback(address: int, ask: bool, _data: object) -> bool:
        tensor = Tensor.from_address(address)
        if ask:
            return wants(tensor)
        seen(TensorView(tensor, _read_tensor))
        return True

    return native.ggml_backend_sched_eval_callback(callback)


def _read_tensor(tensor: int, target: int, offset: int, size: int) -> None:
    """Copy a tensor's bytes to host memory, from whichever backend holds them."""
    read = ggml_library.libggml.ggml_backend_tensor_get
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    read.restype = None
    read(tensor, target, offset, size)
