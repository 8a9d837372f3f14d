"""Make what the engine's process runs: model, context, adapters, draft model, and the loop over them.

What was not configured is chosen here, or measured: a few calls tell how long calls take.
"""

import glob
import hashlib
import re
import time
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from engine import pooled
from engine.drafter import Drafter
from engine.llama import Adapter, Context, Model, gpu_name, without_kernels
from engine.loop import Loop
from engine.memory import uses_mmap
from engine.pace import Pace
from engine.pooled import PooledLoop
from engine.request import EMBEDDING_POOLINGS, EngineConfig, EngineInfo, Guesses, ModelLoadFailed
from engine.states import States

GUESSES_A_CALL = 16  # logits that a call may have for guesses of all, beside one a sequence
WARM_UP_TOKENS = 64  # of a prompt


def load(config: EngineConfig, stack: ExitStack) -> tuple[Loop | PooledLoop, EngineInfo]:
    """Model, context and adapters as configured, and the loop of its kind; freed when `stack` closes."""
    use_mmap = uses_mmap(config, on_gpu=offload_device(config) is not None)
    model = stack.enter_context(
        Model.open(config.model_path, n_gpu_layers=config.n_gpu_layers, use_mmap=use_mmap)
    )
    if config.kind != "text":
        loop = pooled.open_loop(model, config, stack)
        info = describe(config, model, loop.context)
        return loop, replace(info, n_ctx=loop.n_ctx, n_embd=model.n_pooled, pooling=loop.pooling)
    if not model.writes_text:
        raise ModelLoadFailed(
            f"{config.model_path}: {model.description} does not write text; if it is there to embed it, say "
            f"how with pooling: {', '.join(EMBEDDING_POOLINGS)}"
        )
    context = stack.enter_context(open_context(model, config))
    applied = [(Adapter(model, path), scale) for path, scale in config.lora]
    adapters = {name: Adapter(model, path) for name, path in config.adapters}
    if applied:
        context.apply(applied)
    drafter = open_drafter(model, config, stack)
    pace = Pace(max_stall_s=config.max_stall_ms / 1000, in_streams=not context.unified)
    token_bytes = warm_up(context, pace)
    loop = Loop(
        model,
        context,
        n_ctx=config.n_ctx,
        n_parallel=config.n_parallel,
        max_queue=config.max_queue,
        pace=pace,
        guesses=GUESSES_A_CALL if config.speculation == "auto" else 0,
        drafter=drafter,
        ram_bytes=config.cache_ram_mb << 20,
        disk_bytes=config.cache_disk_mb << 20,
        states=States(config.cache_folder, fingerprint=fingerprint(config)) if config.cache_disk_mb else None,
        token_bytes=token_bytes,
        applied=applied,
        adapters=adapters,
    )
    stack.callback(loop.close)
    return loop, describe(config, model, context)


def open_context(model: Model, config: EngineConfig) -> Context:
    """A stream a sequence where the cells are enough for all, else one memory that all share.

    In streams nobody looks at others' cells and a sequence's text does not depend on its neighbours; unified,
    a few long requests and many short ones fit the same memory. Measured with 8 sequences of 1,000 tokens of
    their own: 197 tokens/s in streams, 163 unified (docs/log.md).
    """
    enough = config.n_ctx * config.n_parallel
    n_cells = enough if config.kv_cells is None else min(enough, config.kv_cells)
    return Context.open(
        model,
        n_ctx=n_cells,
        n_batch=max(config.n_batch, config.n_parallel),
        n_seq_max=config.n_parallel,
        n_outputs_max=n_outputs(config),
        n_threads=config.n_threads,
        type_k=config.kv_type_k,
        type_v=config.kv_type_v,
        unified=n_cells < enough,
    )


def n_outputs(config: EngineConfig) -> int:
    """Logits that a call needs at most: one a sequence, and guesses where few enough write (guessing.py).

    A context of many sequences is then the same with and without guesses.
    """
    guessing = min(config.n_parallel, GUESSES_A_CALL) + GUESSES_A_CALL
    return max(config.n_parallel, guessing if config.speculation == "auto" else 0)


def open_drafter(model: Model, config: EngineConfig, stack: ExitStack) -> Drafter | None:
    """The draft model, if one is configured."""
    if config.draft_model is None or config.speculation == "off":
        return None
    drafter = Drafter.open(
        config.draft_model,
        model,
        n_ctx=config.n_ctx,
        n_parallel=config.n_parallel,
        n_threads=config.n_threads,
        n_gpu_layers=config.n_gpu_layers,
    )
    stack.callback(drafter.close)
    drafter.warm_up(max(0, model.bos_id or 0))
    return drafter


def fingerprint(config: EngineConfig) -> str:
    """What a saved state depends on beside its tokens: the model's files, adapters, types, the library.

    Not the draft model: what it guesses is checked, and its own cells are never saved.
    """
    adapters = [*(path for path, _ in config.lora), *(path for _, path in config.adapters)]
    files = [*pieces(config.model_path), *adapters]
    marks = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    parts = [*marks, config.lora, config.adapters, config.kv_type_k, config.kv_type_v, config.n_gpu_layers]
    return hashlib.sha256(repr([*parts, version("llama-cpp-python")]).encode()).hexdigest()


def pieces(path: Path) -> list[Path]:
    """All files of a model of which this is the first: NAME-00001-of-00003.gguf has two more beside it."""
    found = re.fullmatch(r"(.*)-\d{5}(-of-\d{5}\.gguf)", path.name)
    return sorted(path.parent.glob(f"{glob.escape(found[1])}-?????{found[2]}")) if found else [path]


def offload_device(config: EngineConfig) -> str | None:
    """The GPU that layers go to; None when all runs on the CPU."""
    return None if config.n_gpu_layers == 0 else gpu_name()


def slow_attention(config: EngineConfig) -> str | None:
    """Why attention on the CPU is llama.cpp's own; None when it is ours, or a GPU does it."""
    if offload_device(config) is not None:
        return None
    others = sorted({config.kv_type_k, config.kv_type_v} - {"f16", "f32"})  # llama.cpp casts f32 for us
    return f"cells are {' and '.join(others)}, not f16" if others else without_kernels()


def warm_up(context: Context, pace: Pace) -> int:
    """A text through the tokenizer and some calls through the model; the bytes of a saved token.

    The first request finds the weights in memory, and how long calls take is known before it. A vocabulary
    that makes llama.cpp abort does so now, while the file can still be named. Raises ModelLoadFailed when
    there is none.
    """
    if not context.model.has_vocabulary:
        raise ModelLoadFailed(f"{context.model.path}: has no tokenizer; convert the model with its tokenizer")
    context.model.tokenize("a", add_special=True, parse_special=True)
    token = max(0, context.model.bos_id or 0)
    n_most = min(context.n_batch, context.n_ctx_seq)
    decode_tokens(context, token, 1)
    for n_writing in sorted({min(count, n_most) for count in (1, 4, 8)}):
        pace.learn(n_writing=n_writing, n_prompt=0, seconds=decode_tokens(context, token, n_writing))
    n_prompt = min(WARM_UP_TOKENS, n_most)
    pace.learn(n_writing=0, n_prompt=n_prompt, seconds=decode_tokens(context, token, n_prompt))
    size = len(context.save(0))
    context.clear()
    return -(-size // n_prompt)


def decode_tokens(context: Context, token: int, count: int) -> float:
    """Seconds of a call of so many tokens of one sequence."""
    context.clear()
    context.batch.clear()
    context.batch.extend([token] * count, start=0, sequence=0, output=True)
    started = time.perf_counter()
    context.decode()
    context.logits(count - 1)
    return time.perf_counter() - started


def describe(config: EngineConfig, model: Model, context: Context) -> EngineInfo:
    """What the server wants to know of the loaded model."""
    gpu, n_layers = offload_device(config), model.n_layer + 1
    wanted = n_layers if config.n_gpu_layers is None else config.n_gpu_layers
    return EngineInfo(
        n_ctx=config.n_ctx,
        n_parallel=config.n_parallel,
        n_ctx_train=model.n_ctx_train,
        n_vocab=model.n_vocab,
        n_embd=model.n_embd,
        n_params=model.n_params,
        size_bytes=model.size_bytes,
        architecture=model.metadata.get("general.architecture", ""),
        description=model.description,
        chat_template=model.chat_template,
        bos_token=model.token_text(model.bos_id),
        eos_token=model.token_text(model.eos_id),
        bos_id=model.bos_id,
        eos_id=model.eos_id,
        eot_id=model.eot_id,
        add_bos=model.adds_bos,
        gpu=gpu,
        n_threads=context.n_threads,
        slow_attention=slow_attention(config),
        unified=context.unified,
        shares_prefixes=config.kind == "text" and context.can_share_prefixes,
        guesses=guesses(config, context),
        flash_attention=context.flash_attention,
        kernels=own_kernels(config),
        n_layers=n_layers,
        n_gpu_layers=min(wanted, n_layers) if gpu else 0,
    )


def guesses(config: EngineConfig, context: Context) -> Guesses:
    """Where guesses of the next tokens come from, when they pay; cells of wrong ones must be cut off."""
    if config.kind != "text" or config.speculation == "off" or not context.can_share_prefixes:
        return "off"
    return "lookup" if config.draft_model is None else "lookup and draft model"


def own_kernels(config: EngineConfig) -> tuple[str, ...]:
    """What kernels of our own compute on the CPU: weights of the types that they know, attention."""
    if offload_device(config) is not None or without_kernels() is not None:
        return ()
    return ("weights",) if slow_attention(config) else ("attention", "weights")
