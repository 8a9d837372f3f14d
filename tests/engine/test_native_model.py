"""The bindings: loading, tokens, logits, KV memory, the callback over computed tensors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.llama import Context, DecodeFailed, Model, default_threads, evaluate
from engine.request import ModelLoadFailed
from engine.tensor import OP_MUL_MAT, TYPE_F32

TEXT = "The quick brown fox jumps over the lazy dog. 안녕하세요 👋"


@pytest.fixture
def context(model):
    with Context.open(model, n_ctx=256, n_batch=16, n_seq_max=4, n_threads=1) as context:
        yield context


def test_the_model_says_what_it_is(model):
    assert (model.n_vocab, model.n_embd, model.n_layer, model.n_ctx_train) == (49152, 576, 30, 8192)
    assert model.metadata["general.architecture"] == "llama"
    assert "im_start" in (model.chat_template or "")
    assert model.token_text(model.eos_id) == "<|im_end|>"
    assert model.writes_text


def test_tokens_and_text_are_inverse(model):
    tokens = model.tokenize(TEXT, add_special=False)
    assert model.detokenize(tokens) == TEXT
    assert b"".join(model.piece(token) for token in tokens).decode() == TEXT


def test_special_tokens_are_parsed_and_shown_only_on_demand(model):
    assert model.tokenize("<|im_end|>", add_special=False, parse_special=True) == [model.eos_id]
    assert len(model.tokenize("<|im_end|>", add_special=False)) > 1
    assert model.piece(model.eos_id) == b""
    assert model.piece(model.eos_id, special=True) == b"<|im_end|>"
    assert model.is_eog(model.eos_id)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model at all", b"GGUF" + b"\xff" * 100])
def test_a_file_that_is_no_model_fails_with_llama_cpps_reason(tmp_path, content, capfd):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelLoadFailed, match=r"broken\.gguf: ..."):
        Model.open(path)
    assert capfd.readouterr() == ("", ""), "llama.cpp must not print"


def test_a_missing_file_fails_with_its_path(tmp_path):
    with pytest.raises(ModelLoadFailed, match=r"absent\.gguf"):
        Model.open(tmp_path / "absent.gguf")


def test_a_truncated_model_is_refused(tmp_path, smollm2_gguf):
    path = tmp_path / "half.gguf"
    path.write_bytes(smollm2_gguf.read_bytes()[:20_000_000])
    with pytest.raises(ModelLoadFailed, match=r"half\.gguf"):
        Model.open(path)


def test_logits_do_not_depend_on_how_the_text_is_cut_into_calls(model, context):
    tokens = model.tokenize(TEXT)
    whole = evaluate(context, tokens)
    assert whole.shape == (len(tokens), model.n_vocab)
    assert whole.dtype == np.float32
    with Context.open(model, n_ctx=256, n_batch=5, n_threads=1) as other:
        parts = evaluate(other, tokens)
    assert np.abs(whole - parts).max() < 0.1
    assert (whole.argmax(1) == parts.argmax(1)).mean() > 0.9


@pytest.mark.parametrize("n_batch", [5, 64])
def test_only_the_outputs_that_are_asked_for_are_computed_and_they_are_the_same(model, n_batch):
    tokens = model.tokenize(TEXT)
    some = [0, 3, 4, 5, len(tokens) - 1]
    with Context.open(model, n_ctx=256, n_batch=n_batch, n_threads=1) as context:
        whole = evaluate(context, tokens)
        few = evaluate(context, tokens, outputs=some)
        assert few.shape == (5, model.n_vocab)
        assert np.abs(few - whole[some]).max() < 0.1
        assert few.argmax(1).tolist() == whole[some].argmax(1).tolist()
        assert evaluate(context, tokens, outputs=[]).shape == (0, model.n_vocab)


def test_evaluate_starts_from_an_empty_memory_every_time(model, context):
    tokens = model.tokenize(TEXT)
    first = evaluate(context, tokens)
    evaluate(context, tokens[::-1])
    assert np.array_equal(evaluate(context, tokens), first)


def test_more_tokens_than_the_context_are_refused(context):
    with pytest.raises(ValueError, match="do not fit"):
        evaluate(context, [1] * 300)


@pytest.mark.parametrize("unified", [False, True])
def test_a_copied_prefix_serves_another_sequence(model, unified):
    tokens = model.tokenize(TEXT)[:12]
    with Context.open(model, n_ctx=256, n_batch=16, n_seq_max=4, n_threads=1, unified=unified) as context:
        expected = evaluate(context, tokens)[-1]
        context.batch.clear()
        context.batch.extend([*tokens[:-1], 5], start=0, sequence=0, output=False)
        context.batch.add(7, 0, 3, output=False)
        context.decode()
        if unified:
            context.share(0, 3, len(tokens) - 1)
        else:
            assert context.restore(3, context.save(0))
            context.remove(3, len(tokens) - 1)
        context.remove(0)
        assert (context.length(0), context.length(3)) == (0, len(tokens) - 1)
        context.batch.clear()
        index = context.batch.add(tokens[-1], len(tokens) - 1, 3, output=True)
        context.decode()
        assert np.abs(context.logits(index) - expected).max() < 0.1


def test_a_busy_sequence_lends_its_prefix_and_goes_on(model, context):
    tokens = model.tokenize(TEXT)[:8]
    context.batch.clear()
    context.batch.extend(tokens, start=0, sequence=1, output=False)
    context.decode()
    assert context.restore(2, context.save(1))
    context.remove(2, 6)
    context.batch.clear()
    lent = context.batch.extend(tokens[6:], start=6, sequence=2, output=True)
    goes_on = context.batch.add(tokens[0], 8, 1, output=True)
    context.decode()
    logits = context.logits(lent).copy(), context.logits(goes_on).copy()
    assert np.abs(logits[0] - evaluate(context, tokens)[-1]).max() < 0.1
    assert np.abs(logits[1] - evaluate(context, [*tokens, tokens[0]])[-1]).max() < 0.1


@pytest.mark.parametrize("damage", ["short", "long", "header", "empty"])
def test_a_damaged_state_is_refused_and_leaves_the_sequence_empty(model, context, damage, capfd):
    context.batch.clear()
    context.batch.extend(model.tokenize(TEXT)[:8], start=0, sequence=1, output=False)
    context.batch.extend([3, 4, 5], start=0, sequence=2, output=False)
    context.decode()
    data = context.save(1)
    data = {
        "short": data[:-9],
        "long": np.append(data, np.uint8(1)),
        "header": np.concatenate([data[:4] ^ 255, data[4:]]),
        "empty": data[:0],
    }[damage]
    assert not context.restore(2, data)
    assert (context.length(1), context.length(2)) == (8, 0)
    assert capfd.readouterr() == ("", "")


def test_a_full_memory_fails_the_call_and_leaves_the_rest_usable(context):
    for start in range(0, context.n_ctx_seq, 16):
        context.batch.clear()
        context.batch.extend([5] * 16, start=start, sequence=0, output=False)
        context.decode()
    context.batch.clear()
    context.batch.add(5, context.n_ctx_seq, 0, output=True)
    with pytest.raises(DecodeFailed, match="no room") as caught:
        context.decode()
    assert caught.value.status == 1
    context.batch.clear()
    context.batch.add(5, 0, 1, output=True)
    context.decode()


def test_logits_of_an_entry_that_was_not_asked_for_are_an_error(context):
    context.batch.clear()
    context.batch.extend([5, 6], start=0, sequence=0, output=True)
    context.decode()
    with pytest.raises(IndexError):
        context.logits(0)


def test_the_callback_sees_each_product_with_its_inputs(model):
    seen: dict[str, np.ndarray] = {}

    def wants(tensor) -> bool:
        return tensor.op == OP_MUL_MAT and tensor.source(0).name.startswith("blk.0.")

    def see(view) -> bool:
        assert view.tensor.source(1).type == TYPE_F32
        seen[view.weight.name] = view.inputs
        return True

    tokens = model.tokenize(TEXT)[:16]
    with Context.open(model, n_ctx=64, n_batch=16, n_threads=1, wants_tensor=wants, on_tensor=see) as context:
        evaluate(context, tokens)
    assert {"blk.0.attn_q.weight", "blk.0.ffn_down.weight"} <= seen.keys()
    assert seen["blk.0.attn_q.weight"].shape == (1, 16, 576)
    assert seen["blk.0.ffn_down.weight"].shape == (1, 16, 1536)
    assert np.isfinite(seen["blk.0.ffn_down.weight"]).all()
    assert np.array_equal(seen["blk.0.attn_q.weight"], seen["blk.0.attn_k.weight"])


def test_nothing_is_computed_after_the_callback_said_so(model):
    seen = []

    def see(view) -> bool:
        seen.append(view.tensor.name)
        return len(seen) < 3

    with Context.open(model, n_ctx=64, n_batch=16, n_threads=1, on_tensor=see) as context:
        for n_calls in (1, 2):  # the next call begins anew
            seen.clear()
            evaluate(context, [5, 6])
            assert len(seen) == 3, n_calls


def test_what_the_callback_raises_comes_out_of_decode(model):
    def see(_view) -> bool:
        raise RuntimeError("from the callback")

    with (
        Context.open(model, n_ctx=64, n_batch=16, n_threads=1, on_tensor=see) as context,
        pytest.raises(RuntimeError, match="from the callback"),
    ):
        evaluate(context, [5, 6])


def test_threads_default_to_cores_this_process_may_use():
    assert 1 <= default_threads() <= 512
    count = "from engine.llama import default_threads; print(default_threads())"
    command = ["taskset", "-c", "0", sys.executable, "-c", count]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert result.stdout.strip() == "1"
