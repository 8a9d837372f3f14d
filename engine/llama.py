"""The only file that imports llama_cpp for inference: model, context, batch, KV memory, adapters.

Every native handle is a context manager with one owner, freed in reverse order of its making. Nothing here
schedules, samples or knows requests. Tokens are plain ints, positions count from 0 within a sequence.
"""

import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

# How long llama.cpp's threads spin before they sleep; OpenMP reads it once, when it is loaded below. Longer
# is faster on a quiet machine, where a thread waits for the other's last attention head, and ruins a busy one
# (docs/log.md): 2 threads on 2 cores, 256 tokens of context, tokens/s alone and beside 2 busy processes:
# 1,000 spins 82 and 37, 3,000 94 and 33, 10,000 106 and below 8, as OpenMP's own default.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from llama_cpp import _ggml as ggml_library
from llama_cpp import llama_cpp as native

from engine import kernels
from engine.request import EngineError, KVType, ModelLoadFailed, Pooling
from engine.runs import LONGEST_RUN, without_long_runs
from engine.tensor import Tensor, TensorView

KV_TYPES: dict[KVType, int] = {
    "f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8, "iq4_nl": 20, "bf16": 30,
}  # fmt: skip
POOLINGS: dict[str, Pooling] = {"1": "mean", "2": "cls", "3": "last", "4": "rank"}  # as metadata writes it
_POOLING_NUMBERS = {pooling: int(number) for number, pooling in POOLINGS.items()}
_BPE = 2  # LLAMA_VOCAB_TYPE_BPE
_CONTROL = 8  # LLAMA_TOKEN_ATTR_CONTROL
_SPACE_SPLITTERS = frozenset({"bloom", "gpt3-finnish", "poro-chat", "viking", "whitespace"})
_ERROR_LEVELS = (3, 4)  # GGML_LOG_LEVEL_WARN, GGML_LOG_LEVEL_ERROR
_LOG_LINES_KEPT = 40
_FLASH_ATTENTION = re.compile(rb"(?i)flash[_ ]att.*\b(enabled|disabled)\b")
_NO_DEVICES = (ctypes.c_void_p * 1)(None)  # a list of devices that ends at once


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
        self.flash_attention: bool | None = None  # as a context was made last
        self._lock = threading.Lock()
        self._callback = native.llama_log_callback(self._take)
        self._started = False

    def start(self) -> None:
        """Take over llama.cpp's log, initialise its backends, give it our kernels; once."""
        with self._lock:
            if not self._started:
                native.llama_log_set(self._callback, ctypes.c_void_p(0))
                native.llama_backend_init()
                kernels.install(native._lib)
                self._started = True

    def _take(self, level: int, text: bytes, _data: object) -> None:
        if said := _FLASH_ATTENTION.search(text):  # there is no call that tells it
            self.flash_attention = said[1] == b"enabled"
        if level in _ERROR_LEVELS and text.strip(b".\n "):
            self.lines.append(text.decode("utf-8", "replace").strip())
            del self.lines[:-_LOG_LINES_KEPT]

    def reason(self) -> str:
        """What llama.cpp said last, for an error message."""
        said = [line for line in self.lines if line][-3:]
        return "; ".join(said) or "llama.cpp gave no reason"


_log = _Log()


def without_kernels() -> str | None:
    """Why llama.cpp computes all by itself; None when it has our kernels (engine/kernels)."""
    _log.start()
    return kernels.install(native._lib)


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


class Handle:
    """A native object that is freed once, by `close` or at the end of a `with` block."""

    def __init__(self) -> None:
        self._stack = ExitStack()

    def close(self) -> None:
        """Free it; a second call does nothing."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Model(Handle):
    """A loaded GGUF and its vocabulary; read-only, shared by any number of contexts."""

    def __init__(self, pointer: Any, path: Path) -> None:
        super().__init__()
        self.pointer = pointer
        self.path = path
        self._stack.callback(native.llama_model_free, pointer)
        self.vocab: Any = native.llama_model_get_vocab(pointer)
        self._pieces: dict[int, bytes] = {}

    @classmethod
    def open(
        cls, path: Path, *, n_gpu_layers: int | None = None, use_mmap: bool = True, vocab_only: bool = False
    ) -> "Model":
        """Load a GGUF whose header was checked before. Raises ModelLoadFailed with llama.cpp's reason.

        `n_gpu_layers`: with the output head as one of them; None: all; 0: the GPU is left alone altogether,
        which without a layer would still compute prompts and take memory for it.
        """
        _log.start()
        _log.lines.clear()
        parameters = native.llama_model_default_params()
        parameters.n_gpu_layers = 999 if n_gpu_layers is None else n_gpu_layers
        if n_gpu_layers == 0:
            parameters.devices = ctypes.cast(_NO_DEVICES, ctypes.c_void_p)  # pyright: ignore[reportAttributeAccessIssue]
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
    def n_pooled(self) -> int:
        """Numbers that one pooled sequence has: an embedding's width."""
        return native.llama_model_n_embd_out(self.pointer)

    @cached_property
    def pooling(self) -> Pooling | None:
        """How the file says that a sequence's tokens become one result; None for a model of text."""
        key = f"{self.metadata.get('general.architecture')}.pooling_type"
        return POOLINGS.get(self.metadata.get(key, ""))

    @cached_property
    def has_encoder(self) -> bool:
        """Whether it has an encoder beside or instead of a decoder, as T5 does; BERT does not count."""
        return native.llama_model_has_encoder(self.pointer)

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
    def rerank_template(self) -> str | None:
        """A reranker's prompt with {query} and {document} in it; None for those that take a plain pair."""
        template = native.llama_model_chat_template(self.pointer, b"rerank")
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
    def sep_id(self) -> int | None:
        return _token_or_none(native.llama_vocab_sep(self.vocab))

    @property
    def adds_bos(self) -> bool:
        return native.llama_vocab_get_add_bos(self.vocab)

    @property
    def adds_eos(self) -> bool:
        return native.llama_vocab_get_add_eos(self.vocab)

    @property
    def adds_sep(self) -> bool:
        return native.llama_vocab_get_add_sep(self.vocab)

    @property
    def control_texts(self) -> frozenset[str]:
        """How the vocabulary writes its control tokens."""
        tokens = range(self.n_vocab)
        control = (t for t in tokens if native.llama_vocab_get_attr(self.vocab, t) & _CONTROL)
        return frozenset(filter(None, map(self.token_text, control)))

    @cached_property
    def eog_tokens(self) -> frozenset[int]:
        """Every token that ends a generation."""
        return frozenset(t for t in range(self.n_vocab) if native.llama_vocab_is_eog(self.vocab, t))

    def is_eog(self, token: int) -> bool:
        """Whether the token ends a generation."""
        return token in self.eog_tokens

    @cached_property
    def has_vocabulary(self) -> bool:
        """False for files without a tokenizer, which llama.cpp loads and then aborts on the first text."""
        return native.llama_vocab_type(self.vocab) != native.LLAMA_VOCAB_TYPE_NONE

    @cached_property
    def writes_text(self) -> bool:
        """Whether it is a causal decoder; encoders and diffusion models are not."""
        pointer = self.pointer
        return (
            native.llama_model_has_decoder(pointer)
            and not native.llama_model_has_encoder(pointer)
            and not native.llama_model_is_diffusion(pointer)
            and self.metadata.get(f"{self.metadata.get('general.architecture')}.attention.causal") != "false"
        )

    def tokenize(
        self, text: str | bytes, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """Token ids; `parse_special` turns the text of special tokens into those tokens.

        With a BPE vocabulary, runs of thousands of like characters are tokenized in parts.
        """
        data = text.encode() if isinstance(text, str) else text
        if native.llama_vocab_type(self.vocab) != _BPE or len(data) <= LONGEST_RUN:
            return self._tokenize(data, add_special, parse_special)
        parts = without_long_runs(data.decode("utf-8", "replace"), mixed=self._splits_at_spaces_only)
        if len(parts) == 1:
            return self._tokenize(data, add_special, parse_special)
        tokens = [token for part in parts for token in self._tokenize(part.encode(), False, parse_special)]
        if add_special and self.adds_bos and self.bos_id is not None:
            tokens.insert(0, self.bos_id)
        if add_special and native.llama_vocab_get_add_eos(self.vocab) and self.eos_id is not None:
            tokens.append(self.eos_id)
        return tokens

    @cached_property
    def _splits_at_spaces_only(self) -> bool:
        return self.metadata.get("tokenizer.ggml.pre") in _SPACE_SPLITTERS

    def _tokenize(self, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
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
        """The bytes a token stands for, maybe half a character; special tokens are empty unless asked for."""
        buffer = ctypes.create_string_buffer(64)
        count = native.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        if count < 0:
            buffer = ctypes.create_string_buffer(-count)
            count = native.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, special)
        return buffer.raw[:count]

    def written(self, token: int) -> bytes:
        """`piece` of a token that the model wrote, remembered."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self.piece(token)
        return piece

    def detokenize(self, tokens: Iterable[int], *, special: bool = False) -> str:
        """The text of a whole token sequence."""
        return b"".join(self.piece(t, special=special) for t in tokens).decode("utf-8", "replace")

    def token_text(self, token: int | None) -> str:
        """How the vocabulary writes a token, such as "<|im_end|>"; "" for None."""
        return "" if token is None else native.llama_vocab_get_text(self.vocab, token).decode("utf-8")


def _token_or_none(token: Any) -> int | None:
    return None if token < 0 else token


class Context(Handle):
    """A KV memory over a model, and the one batch that is decoded into it. Not thread-safe."""

    def __init__(
        self, pointer: Any, model: Model, *, n_batch: int, unified: bool, watcher: "_Watcher | None"
    ) -> None:
        super().__init__()
        self.pointer = pointer
        self.model = model
        self.n_batch = n_batch
        self._watcher = watcher
        self._stack.callback(native.llama_free, pointer)
        self.memory: Any = native.llama_get_memory(pointer)
        self.n_ctx: int = native.llama_n_ctx(pointer)  # cells in all
        self.n_ctx_seq: int = native.llama_n_ctx_seq(pointer)  # cells that one sequence can use
        self.unified = unified
        self.flash_attention = _log.flash_attention  # None: llama.cpp did not say
        self.n_threads: int = native.llama_n_threads(pointer)
        self._has_kernels = without_kernels() is None
        self._views: dict[int, np.ndarray] = {}  # of logits, by address
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
        unified: bool = False,
        pooling: Pooling | None = None,
        wants_tensor: Callable[[Tensor], bool] | None = None,
        on_tensor: Callable[[TensorView], bool] | None = None,
    ) -> "Context":
        """A context of `n_ctx` cells, cut evenly into one stream a sequence, or `unified` over all.

        In a stream a sequence's cells lie in order and nobody else's are looked at, so that what it
        computes does not depend on its neighbours; unified, prefixes are shared without a copy.
        `on_tensor` sees each computed tensor that `wants_tensor` picked and says whether to compute on
        (False: nothing more, but for what lies on another device); what it raises comes out of `decode`.
        `n_outputs_max` bounds the logits of one call (None: all tokens may have some). `pooling` is how
        calls after `pool(True)` make one result of each sequence. Raises ModelLoadFailed.
        """
        _log.lines.clear()
        _log.flash_attention = None
        parameters = native.llama_context_default_params()
        parameters.n_ctx = n_ctx
        parameters.n_batch = parameters.n_ubatch = n_batch
        parameters.n_seq_max = n_seq_max
        parameters.n_outputs_max = n_outputs_max or 0
        parameters.n_threads = parameters.n_threads_batch = n_threads or default_threads()
        parameters.type_k, parameters.type_v = KV_TYPES[type_k], KV_TYPES[type_v]
        parameters.kv_unified = unified
        if pooling is not None:
            parameters.pooling_type = _POOLING_NUMBERS[pooling]
        parameters.swa_full = True  # else prefixes could not be shared or cut
        parameters.no_perf = True
        watcher = None
        if on_tensor is not None:
            watcher = _Watcher(wants_tensor or (lambda _: True), on_tensor)
            parameters.cb_eval = watcher.callback
        pointer = native.llama_init_from_model(model.pointer, parameters)
        if not pointer:
            raise ModelLoadFailed(f"{model.path}: no context of {n_ctx} tokens: {_log.reason()}")
        return cls(pointer, model, n_batch=n_batch, unified=unified, watcher=watcher)

    def decode(self) -> None:
        """Run what lies in `batch`. Raises DecodeFailed; cells of the batch's positions may be left then."""
        if self._has_kernels:
            kernels.wide(self.unified)  # there cells lie wherever there was room
        status = native.llama_decode(self.pointer, self.batch.native)
        if self._watcher is not None:
            self._watcher.raise_error()
        if status != 0:
            raise DecodeFailed(status)

    def logits(self, index: int) -> np.ndarray:
        """A view of the (n_vocab,) float32 logits of batch entry `index`, valid until the next decode."""
        pointer = native.llama_get_logits_ith(self.pointer, index)
        if not pointer:
            raise IndexError(f"batch entry {index} was not flagged as an output")
        address = ctypes.addressof(pointer.contents)  # pyright: ignore[reportAttributeAccessIssue]
        view = self._views.get(address)
        if view is None:  # llama.cpp keeps its buffer, and building a view costs as much as choosing a token
            view = self._views[address] = np.ctypeslib.as_array(pointer, shape=(self.model.n_vocab,))
        return view

    def pool(self, on: bool) -> None:
        """Whether the calls that follow pool their sequences; no call gives logits then."""
        native.llama_set_embeddings(self.pointer, on)

    def pooled(self, sequence: int, width: int) -> np.ndarray:
        """A copy of the (width,) float32 result of a sequence of the last call, which pooled."""
        pointer = native.llama_get_embeddings_seq(self.pointer, sequence)
        if not pointer:
            raise IndexError(f"sequence {sequence} was not in the last call")
        return np.ctypeslib.as_array(pointer, shape=(width,)).copy()

    @property
    def is_causal(self) -> bool:
        """Whether tokens look back only, and later calls may go on from what is in the memory."""
        return bool(self.memory) and native.llama_get_causal_attn(self.pointer)

    def remove(self, sequence: int, start: int = 0, end: int = -1) -> None:
        """Forget positions [start, end) of a sequence; -1 means to its end."""
        native.llama_memory_seq_rm(self.memory, sequence, start, end)

    def share(self, source: int, target: int, length: int) -> None:
        """Unified memory: let `target` hold the cells of the first `length` tokens of `source`, only these.

        Between streams llama.cpp copies all cells, and not before the next decode, when they may hold
        something else already: use `save` and `restore` there.
        """
        assert self.unified
        self.remove(target)
        native.llama_memory_seq_cp(self.memory, source, target, 0, length)

    def save(self, sequence: int) -> np.ndarray:
        """All that a sequence has computed, as bytes in host memory; empty when llama.cpp cannot."""
        size = native.llama_state_seq_get_size(self.pointer, sequence)  # pyright: ignore[reportArgumentType]
        data = np.empty(size, np.uint8)
        count = native.llama_state_seq_get_data(self.pointer, _bytes_pointer(data), size, sequence)  # pyright: ignore[reportArgumentType]
        return data[:count]

    def restore(self, sequence: int, data: np.ndarray) -> bool:
        """Let a sequence hold what `save` gave and nothing else; if False, it holds nothing at all."""
        count = native.llama_state_seq_set_data(self.pointer, _bytes_pointer(data), len(data), sequence)  # pyright: ignore[reportArgumentType]
        if count == 0 or count != len(data):
            self.remove(sequence)
            return False
        return True

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds."""
        return native.llama_memory_seq_pos_max(self.memory, sequence) + 1

    @property
    def can_share_prefixes(self) -> bool:
        """False for recurrent memories: their state cannot be cut back to a prefix."""
        model = self.model.pointer
        return not (native.llama_model_is_recurrent(model) or native.llama_model_is_hybrid(model))

    @property
    def n_window(self) -> int:
        """Tokens that sliding-window layers look back on; 0 without such layers."""
        return native.llama_model_n_swa(self.model.pointer)

    def clear(self) -> None:
        """Forget everything."""
        native.llama_memory_clear(self.memory, False)

    def apply(self, adapters: Sequence[tuple["Adapter", float]]) -> None:
        """Use these LoRA adapters, and only these, from the next decode on."""
        pointers = (native.llama_adapter_lora_p_ctypes * len(adapters))(*[a.pointer for a, _ in adapters])
        scales = (ctypes.c_float * len(adapters))(*[scale for _, scale in adapters])
        if native.llama_set_adapters_lora(self.pointer, pointers, len(adapters), scales):
            raise ModelLoadFailed(f"the LoRA adapters cannot be applied together: {_log.reason()}")


class Adapter:
    """A LoRA adapter in llama.cpp's GGUF form; freed together with its model."""

    def __init__(self, model: Model, path: Path) -> None:
        _log.lines.clear()
        self.pointer = native.llama_adapter_lora_init(model.pointer, str(path).encode())
        if not self.pointer:
            raise ModelLoadFailed(f"{path}: the adapter does not fit {model.path.name}: {_log.reason()}")


class Batch:
    """Tokens of one decode call, filled in place; each belongs to one sequence."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.native = native.llama_batch_init(capacity, 0, 1)
        size = (capacity,)
        self._tokens = np.ctypeslib.as_array(self.native.token, size)
        self._positions = np.ctypeslib.as_array(self.native.pos, size)
        self._outputs = np.ctypeslib.as_array(self.native.logits, size)
        self._sequences = [np.ctypeslib.as_array(self.native.seq_id[i], (1,)) for i in range(capacity)]
        np.ctypeslib.as_array(self.native.n_seq_id, size)[:] = 1

    def __len__(self) -> int:
        return self.native.n_tokens

    def clear(self) -> None:
        """Start over."""
        self.native.n_tokens = 0

    def add(self, token: int, position: int, sequence: int, *, output: bool) -> int:
        """Append one token; returns its index, under which its logits are found if `output`."""
        return self.extend((token,), start=position, sequence=sequence, output=output)

    def extend(self, tokens: Sequence[int], *, start: int, sequence: int, output: bool) -> int:
        """Append consecutive tokens from position `start`; the index of the last, whose logits `output` asks.

        The caller keeps within `capacity`.
        """
        first, end = self.native.n_tokens, self.native.n_tokens + len(tokens)
        if end == first + 1:  # by far the most frequent; slices cost several times more
            self._tokens[first], self._positions[first], self._outputs[first] = tokens[0], start, output
            self._sequences[first][0] = sequence
            self.native.n_tokens = end
            return first
        self._tokens[first:end] = tokens
        self._positions[first:end] = range(start, start + len(tokens))
        self._outputs[first:end] = 0
        self._outputs[end - 1] = output
        for cell in self._sequences[first:end]:
            cell[0] = sequence
        self.native.n_tokens = end
        return end - 1

    def want(self, indices: np.ndarray) -> None:
        """Ask for the logits of these entries too."""
        self._outputs[indices] = 1

    def close(self) -> None:
        """Free it; the arrays over it are not to be touched again."""
        native.llama_batch_free(self.native)


def _bytes_pointer(data: np.ndarray) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))


def default_threads() -> int:
    """Physical cores that this process may use: its affinity and its control group's quota count."""
    import psutil

    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        allowed, period = quota.read_text().split()
        if allowed != "max":
            cores = min(cores, round(int(allowed) / int(period)))
    return max(1, cores)


def evaluate(
    context: Context, tokens: Sequence[int], *, outputs: Sequence[int] | np.ndarray | None = None
) -> np.ndarray:
    """Float32 logits of one sequence, read from an empty KV memory in calls of n_batch.

    (len(outputs), n_vocab): those after each position in `outputs`, which ascends; None: after every token.
    The output head is a fifth of a small model's work, so fewer outputs are faster.
    """
    wanted = np.arange(len(tokens)) if outputs is None else np.asarray(outputs, np.int64)
    result = np.empty((len(wanted), context.model.n_vocab), np.float32)
    for first, end in calls(context, tokens, wanted):
        if end > first:
            pointer = native.llama_get_logits(context.pointer)
            result[first:end] = np.ctypeslib.as_array(pointer, shape=(end - first, context.model.n_vocab))
    return result


def calls(context: Context, tokens: Sequence[int], wanted: np.ndarray) -> Iterator[tuple[int, int]]:
    """Read one sequence from an empty KV memory, n_batch tokens a call, and leave the memory empty.

    `wanted` (n,) are ascending positions; after each call [first, end) of them have logits in the context.
    """
    if len(tokens) > context.n_ctx_seq:
        raise ValueError(f"{len(tokens)} tokens do not fit a context of {context.n_ctx_seq}")
    context.clear()
    for start in range(0, len(tokens), context.n_batch):
        chunk = tokens[start : start + context.n_batch]
        first, end = np.searchsorted(wanted, (start, start + len(chunk)))
        context.batch.clear()
        context.batch.extend(chunk, start=start, sequence=0, output=False)
        context.batch.want(wanted[first:end] - start)
        context.decode()
        yield first, end
    context.clear()


class _Watcher:
    """llama.cpp asks for every node of the graph (`ask`), then hands over those that were wanted."""

    def __init__(self, wants: Callable[[Tensor], bool], seen: Callable[[TensorView], bool]) -> None:
        self._wants, self._seen = wants, seen
        self._error: BaseException | None = None
        self.callback = native.ggml_backend_sched_eval_callback(self._call)

    def _call(self, address: int, ask: bool, _data: object) -> bool:
        try:
            tensor = Tensor.from_address(address)
            if ask:
                return self._error is None and self._wants(tensor)
            return self._seen(TensorView(tensor, _read_tensor))
        except BaseException as error:  # it must not cross native frames; `raise_error` brings it back
            self._error = error
            return False

    def raise_error(self) -> None:
        """Raise what a callback raised during the last call."""
        error, self._error = self._error, None
        if error is not None:
            raise error


def _read_tensor(tensor: int, target: int, offset: int, size: int) -> None:
    """Copy a tensor's bytes to host memory, from whichever backend holds them."""
    read = ggml_library.libggml.ggml_backend_tensor_get
    read.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    read.restype = None
    read(tensor, target, offset, size)
