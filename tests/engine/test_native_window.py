"""A model whose layers slide a window: what is shared and cut is what a request would have computed alone."""

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from engine.llama import Context, Model, evaluate, native
from engine.loop import Loop
from engine.request import Delta, Done, EngineError, GenerationRequest, Sampling
from engine.sequence import Begin

WINDOW, N_CTX = 16, 160
WIDTH, HEAD, INNER, N_LAYERS = 64, 32, 96, 7  # the sixth layer looks back on everything
WORDS = 300  # of the vocabulary, that prompts are made of


@pytest.fixture(scope="module")
def sliding(smollm2_gguf: Path, tmp_path_factory) -> Iterator[Model]:
    """Gemma 3's shape with random weights, and another model's vocabulary."""
    path = tmp_path_factory.mktemp("sliding") / "tiny-gemma3.gguf"
    write_gemma3(path, gguf.GGUFReader(smollm2_gguf))
    with Model.open(path) as model:
        yield model


def write_gemma3(path: Path, vocabulary: gguf.GGUFReader) -> None:
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(HEAD)
    writer.add_value_length(HEAD)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_sliding_window(WINDOW)
    for field in vocabulary.fields.values():
        if field.name.startswith("tokenizer.ggml."):
            kind = field.types[0]
            part = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, part)
    n_vocab = len(vocabulary.fields["tokenizer.ggml.tokens"].data)
    chance = np.random.default_rng(7)

    def add(name: str, *shape: int, spread: float) -> None:
        writer.add_tensor(f"{name}.weight", chance.normal(0, spread, shape).astype(np.float32))

    def ones(name: str, n: int) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(n, np.float32))

    add("token_embd", n_vocab, WIDTH, spread=0.2)
    ones("output_norm", WIDTH)
    for layer in range(N_LAYERS):
        block = f"blk.{layer}"
        for norm, n in (("attn_norm", WIDTH), ("attn_q_norm", HEAD), ("attn_k_norm", HEAD)):
            ones(f"{block}.{norm}", n)
        for norm in ("post_attention_norm", "ffn_norm", "post_ffw_norm"):
            ones(f"{block}.{norm}", WIDTH)
        add(f"{block}.attn_q", 2 * HEAD, WIDTH, spread=0.2)
        add(f"{block}.attn_k", HEAD, WIDTH, spread=0.2)
        add(f"{block}.attn_v", HEAD, WIDTH, spread=0.2)
        add(f"{block}.attn_output", WIDTH, 2 * HEAD, spread=0.2)
        add(f"{block}.ffn_gate", INNER, WIDTH, spread=0.1)
        add(f"{block}.ffn_up", INNER, WIDTH, spread=0.1)
        add(f"{block}.ffn_down", WIDTH, INNER, spread=0.1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Watched(Loop):
    """Looks after each decision whether the memory holds what the next token looks back on."""

    def _act(self, actions) -> None:
        actions = list(actions)
        super()._act(actions)
        for action in actions:
            if isinstance(action, Begin) and self.scheduler.slots[action.slot].sequence is action.sequence:
                first = native.llama_memory_seq_pos_min(self.context.memory, action.slot)
                assert first <= max(0, action.length - WINDOW + 1), "cells are missing"
                assert self.context.length(action.slot) == action.length, "it was lost on the way"


def open_context(model: Model, *, n_parallel: int, unified: bool = False) -> Context:
    return Context.open(
        model,
        n_ctx=N_CTX * n_parallel,
        n_batch=64,
        n_seq_max=n_parallel,
        n_threads=1,
        type_k="bf16",
        unified=unified,
    )


def answers(loop: Loop, prompts: list[list[int]], *, n_tokens: int) -> tuple[list[list[int]], list[int]]:
    """What each was answered, and how much of each prompt was cached; all arrive together."""
    tokens: list[list[int]] = [[] for _ in prompts]
    cached = [0] * len(prompts)
    for id, prompt in enumerate(prompts):
        greedy = Sampling(temperature=0)
        loop.submit(id, GenerationRequest(tuple(prompt), greedy, max_tokens=n_tokens, ignore_eos=True))
    while not loop.idle:
        for id, event in loop.step():
            assert isinstance(id, int)
            assert not isinstance(event, EngineError)
            if isinstance(event, Delta):
                tokens[id] += event.tokens
            elif isinstance(event, Done):
                cached[id] = event.n_cached_tokens
    return tokens, cached


def check_alone(model: Model, prompts: list[list[int]], tokens: list[list[int]]) -> None:
    """Each token is the model's own choice, or as good as, after what went before."""
    with Context.open(model, n_ctx=N_CTX, n_batch=N_CTX, n_threads=1, type_k="bf16") as context:
        for prompt, written in zip(prompts, tokens, strict=True):
            outputs = np.arange(len(prompt) - 1, len(prompt) + len(written) - 1)
            logits = evaluate(context, [*prompt, *written], outputs=outputs)
            logits[:, sorted(model.eog_tokens)] = -np.inf
            chosen = logits[np.arange(len(outputs)), written]
            assert (logits.max(axis=1) - chosen).max() < 0.05


def prompts_of(n: int, *, common: int, own: int, seed: int = 0) -> list[list[int]]:
    chance = np.random.default_rng(seed)
    stem = np.random.default_rng(99).integers(100, 100 + WORDS, common).tolist()
    return [stem + chance.integers(100, 100 + WORDS, own).tolist() for _ in range(n)]


def test_the_tiny_model_slides_and_its_far_past_matters(sliding):
    assert native.llama_model_n_swa(sliding.pointer) == WINDOW
    (left, _), tokens = prompts_of(2, common=0, own=60), [[0]]
    with Context.open(sliding, n_ctx=N_CTX, n_batch=N_CTX, n_threads=1, type_k="bf16") as context:
        logits = [evaluate(context, part, outputs=[len(part) - 1])[0] for part in (left, [101, *left[1:]])]
    assert abs(logits[0] - logits[1]).max() > 0.1
    with pytest.raises(AssertionError):
        check_alone(sliding, [left], tokens)


@pytest.mark.parametrize("unified", [False, True])
def test_prompts_that_arrive_together_share_what_they_have_in_common(sliding, unified):
    prompts = prompts_of(6, common=90, own=9)
    with open_context(sliding, n_parallel=3, unified=unified) as context:
        loop = Watched(sliding, context, n_ctx=N_CTX, n_parallel=3)
        tokens, cached = answers(loop, prompts, n_tokens=20)
        loop.close()
    assert cached[:3] == [0, 90, 90]
    if not unified:  # there a slot is cut where it is
        assert cached[3:] == [90, 90, 90]
    check_alone(sliding, prompts, tokens)


def test_one_after_the_other_they_cut_the_slot_where_it_is(sliding):
    prompts = [*prompts_of(1, common=90, own=30), *prompts_of(1, common=50, own=20, seed=3)]
    prompts += prompts_of(1, common=20, own=60, seed=4)
    with open_context(sliding, n_parallel=1) as context:
        loop = Watched(sliding, context, n_ctx=N_CTX, n_parallel=1)
        tokens, cached = answers(loop, prompts, n_tokens=20)
        loop.close()
    assert cached == [0, 50, 20]
    check_alone(sliding, prompts, tokens)


@pytest.mark.parametrize("seed", range(3))
def test_random_prompts_in_slots_and_memory(sliding, seed):
    chance = np.random.default_rng(seed)
    prompts = []
    for number in range(14):
        common, own = int(chance.integers(0, 90)), int(chance.integers(1, 30))
        prompts += prompts_of(1, common=common, own=own, seed=1000 * seed + number)
    with open_context(sliding, n_parallel=3) as context:
        loop = Watched(sliding, context, n_ctx=N_CTX, n_parallel=3, ram_bytes=400_000, token_bytes=1_800)
        tokens, cached = answers(loop, prompts, n_tokens=15)
        loop.close()
    assert sum(cached) > 0
    check_alone(sliding, prompts, tokens)
