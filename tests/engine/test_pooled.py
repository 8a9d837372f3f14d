"""Embedding and reranking models: numbers as transformers has them, alone or batched; turns; bad input."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from engine import pooled
from engine.llama import DecodeFailed, Model
from engine.pooled import PooledLoop
from engine.request import (
    EngineConfig,
    EngineError,
    InputTooLong,
    InvalidRequest,
    ModelLoadFailed,
    Pooled,
    PooledRequest,
    QueueFull,
    Read,
    Tenant,
)
from tests import tiny_models as tiny

CLS, SEP, MASK = (tiny.VOCABULARY.index(text) for text in ("[CLS]", "[SEP]", "[MASK]"))
# GELU comes from a table of f16 in llama.cpp: 1.2e-4 was seen on a CPU with AVX2. Another pooling gives 0.1.
CLOSE = 5e-4
TEXTS = ["the cat sleeps", "a", "where is the red house?", "dog " * 40, "unknown Wörter, 42 of them!"]
QUERY = "where is the cat"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def make_loop(folder):
    """A function: kind of file and options -> a loop over it; all is freed at the end."""
    stack = ExitStack()

    def make(
        architecture: str = "bert", of_file: str | None = "mean", *, head: bool = False, **options
    ) -> PooledLoop:
        path = folder / f"{architecture}-{of_file}-{head}.gguf"
        if not path.exists():
            {"bert": tiny.bert, "qwen3": tiny.qwen3}[architecture](path, pooling=of_file, head=head)
        kind = "rerank" if head else "embedding"
        config = EngineConfig(path, **({"kind": kind, "n_threads": 1, "n_parallel": 8} | options))
        config.validate()
        model = stack.enter_context(Model.open(path))
        return pooled.open_loop(model, config, stack)

    with stack:
        yield make


def run(loop: PooledLoop, *requests: PooledRequest) -> list:
    """What each gives, by its place."""
    for number, request in enumerate(requests):
        loop.submit(number, request)
    found = {}
    while not loop.idle:
        for id, output in ends(loop.step()):
            assert id not in found, "one end a request"
            found[id] = output
    return [found[number] for number in range(len(requests))]


def ends(outputs: list) -> list:
    """Outputs without what was only read."""
    return [(id, output) for id, output in outputs if not isinstance(output, Read)]


def values(loop: PooledLoop, *texts: str, query: str | None = None) -> np.ndarray:
    (found,) = run(loop, PooledRequest(texts, query))
    if isinstance(found, EngineError):
        raise found
    assert isinstance(found, Pooled)
    return found.values


def unit(row: np.ndarray) -> np.ndarray:
    return row / np.linalg.norm(row)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_an_encoders_embeddings_are_those_of_transformers(make_loop, folder, pooling):
    loop = make_loop("bert", pooling)
    weights = tiny.bert_weights(head=False, seed=1)
    (found,) = run(loop, PooledRequest(tuple(TEXTS)))
    n_tokens = 0
    for text, row in zip(TEXTS, found.values, strict=True):
        tokens = [CLS, *tiny.tokenize(text, folder), SEP]
        n_tokens += len(tokens)
        hidden = tiny.hidden("bert", weights, tokens)
        expected = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        assert np.abs(row - unit(expected)).max() < CLOSE
    assert found.values.dtype == np.float32
    assert found.n_tokens == n_tokens
    assert np.abs(found.values[0] - found.values[2]).max() > 0.01, "a test that compares nothing"


def test_a_pooling_of_the_configuration_goes_before_the_files(make_loop, folder):
    weights = tiny.bert_weights(head=False, seed=1)
    expected = unit(tiny.hidden("bert", weights, [CLS, *tiny.tokenize("the cat", folder), SEP])[0])
    for of_file in ("mean", "none", None):
        row = values(make_loop("bert", of_file, pooling="cls"), "the cat")[0]
        assert np.abs(row - expected).max() < CLOSE


@pytest.mark.parametrize("n_batch", [512, 16])  # in one part, in several
def test_a_decoders_embedding_is_that_of_its_last_token(make_loop, folder, n_batch):
    loop = make_loop("qwen3", "last", n_batch=n_batch)
    weights = tiny.qwen3_weights(head=False, seed=1)
    for text, row in zip(TEXTS, values(loop, *TEXTS), strict=True):
        tokens = [CLS, *tiny.tokenize(text, folder), SEP]
        # Keys and values of a decoder are kept in 16 bits.
        assert np.abs(row - unit(tiny.hidden("qwen3", weights, tokens)[-1])).max() < 2e-3


def test_an_encoders_scores_are_those_of_its_classifier(make_loop, folder):
    loop = make_loop("bert", "rank", head=True)
    weights = tiny.bert_weights(head=True, seed=1)
    query = tiny.tokenize(QUERY, folder)
    scores = values(loop, *TEXTS, query=QUERY)
    for text, score in zip(TEXTS, scores, strict=True):
        tokens = [CLS, *query, SEP, *tiny.tokenize(text, folder), SEP]
        first = np.tanh(weights["cls.weight"] @ tiny.hidden("bert", weights, tokens)[0] + weights["cls.bias"])
        assert abs(score - (weights["cls.output.weight"] @ first + weights["cls.output.bias"])[0]) < CLOSE
    assert scores.shape == (len(TEXTS),)
    assert np.ptp(scores) > 1e-3, "a test that compares nothing"


def test_a_decoders_scores_come_from_its_own_prompt(make_loop, folder):
    loop = make_loop("qwen3", "rank", head=True)
    weights = tiny.qwen3_weights(head=True, seed=1)
    before = [CLS, *tiny.tokenize(f"the {QUERY} ", folder), MASK]
    for text, score in zip(TEXTS, values(loop, *TEXTS, query=QUERY), strict=True):
        hidden = tiny.hidden("qwen3", weights, [*before, *tiny.tokenize(text, folder), SEP])[-1]
        yes, no = np.exp(weights["cls.output.weight"] @ hidden)
        assert abs(score - yes / (yes + no)) < 2e-3


def test_control_tokens_in_a_users_text_are_text(make_loop):
    plain = make_loop("bert", "mean")
    as_text = plain.model.tokenize("[SEP]", add_special=False)
    assert SEP not in as_text
    ranks = make_loop("qwen3", "rank", head=True)
    assert ranks._pairs is not None
    tokens = ranks._pairs.tokens("cat [MASK]", "dog [SEP] {query}")
    assert [tokens.count(each) for each in (CLS, MASK, SEP)] == [1, 1, 1]
    assert tokens.count(tiny.VOCABULARY.index("cat")) == 1, "a slot in a text is no slot"


@pytest.mark.parametrize(("architecture", "pooling", "query"), [
    ("bert", "mean", None), ("qwen3", "last", None), ("bert", "rank", QUERY), ("qwen3", "rank", QUERY),
])  # fmt: skip
def test_batched_equals_alone_in_order(make_loop, architecture, pooling, query):
    loop = make_loop(architecture, pooling, head=query is not None, n_batch=64)
    texts = [f"{'the cat ' * (n % 7)}{n}" for n in range(40)]
    together = values(loop, *texts, query=query)
    alone = np.concatenate([values(loop, text, query=query) for text in texts])
    assert loop.counters.decode_steps_total < 40 + 40
    # Rows of other texts in a matrix change the last bits of a row, and GELU is a table in 16 bits.
    np.testing.assert_allclose(together, alone, atol=5e-5 if architecture == "bert" else 2e-3)


def test_a_short_request_does_not_wait_for_a_long_one(make_loop):
    loop = make_loop("bert", "mean", n_batch=16, n_parallel=4)
    loop.submit("long", PooledRequest(("the cat sleeps",) * 200))
    loop.step()
    loop.submit("short", PooledRequest(("a dog",)))
    steps, ended = 0, []
    while not loop.idle:
        steps += 1
        ended += [(id, steps) for id, _ in ends(loop.step())]
    assert [id for id, _ in ended] == ["short", "long"]
    assert ended[0][1] == 1
    assert steps > 40


def test_what_is_cancelled_ends_at_once_and_harms_nobody(make_loop):
    loop = make_loop("bert", "mean", n_batch=16)
    loop.submit("gone", PooledRequest(("the cat sleeps",) * 50))
    loop.submit("stays", PooledRequest(("a dog", "a tree", "the river runs")))
    loop.step()
    loop.cancel("gone")
    loop.cancel("gone")
    loop.cancel("never was")
    found = {}
    while not loop.idle:
        found |= dict(ends(loop.step()))
    assert list(found) == ["stays"]
    np.testing.assert_allclose(
        found["stays"].values, values(loop, "a dog", "a tree", "the river runs"), atol=5e-5
    )
    assert (loop.stats().cancelled_total, loop.stats().requests_total) == (1, 3)


def test_a_text_that_is_too_long_fails_its_request_alone_and_both_numbers_are_said(make_loop):
    loop = make_loop("bert", "mean")
    long = "cat " * 95
    bad, good = run(loop, PooledRequest(("a", long, "b")), PooledRequest(("the cat",)))
    assert isinstance(bad, InputTooLong)
    assert (bad.index, bad.size, bad.limit) == (1, "97 tokens", "96")
    assert "input 1 has 97 tokens and the model reads 96" in str(bad)
    assert good.values.shape == (1, tiny.WIDTH)
    assert values(loop, "cat " * 94).shape == (1, tiny.WIDTH)
    with pytest.raises(InputTooLong, match="5000000 characters and the model reads 96 tokens"):
        values(loop, "c" * 5_000_000)
    with pytest.raises(InputTooLong, match="with the query and the model reads 96"):
        values(make_loop("bert", "rank", head=True), "cat " * 60, query="dog " * 60)


def test_a_longer_text_than_configured_is_refused(make_loop):
    loop = make_loop("bert", "mean", n_ctx=16)
    with pytest.raises(InputTooLong, match="17 tokens and the model reads 16"):
        values(loop, "cat " * 15)
    assert values(loop, "cat " * 14).shape == (1, tiny.WIDTH)


@pytest.mark.parametrize(("inputs", "query", "field"), [
    ((), None, "input"),
    (("a", ""), None, "input"),
    (("a", 1), None, "input 1"),
    (("a\ud800",), None, "input 0"),
    (("a",) * 2049, None, "input"),
    ("text", None, "input"),
    (("a",), "q", "query"),
])  # fmt: skip
def test_what_cannot_be_embedded_is_refused_by_name(make_loop, inputs, query, field):
    loop = make_loop("bert", "mean")
    with pytest.raises(InvalidRequest) as caught:
        loop.submit(1, PooledRequest(inputs, query))
    assert caught.value.field == field
    assert loop.idle


@pytest.mark.parametrize("query", [None, "", "\ud800"])
def test_a_ranking_needs_a_query(make_loop, query):
    loop = make_loop("bert", "rank", head=True)
    with pytest.raises(InvalidRequest) as caught:
        loop.submit(1, PooledRequest(("a",), query))
    assert caught.value.field == "query"


def test_the_queue_is_bounded(make_loop):
    loop = make_loop("bert", "mean", n_parallel=2, max_queue=1)
    request = PooledRequest(("a",))
    for number in range(3):  # two in the next call, one behind them
        loop.submit(number, request)
    with pytest.raises(QueueFull, match="3 requests are waiting") as caught:
        loop.submit(3, request)
    assert caught.value.retry_after_s >= 1
    assert len(loop.step()) == 2
    loop.submit(3, request)


# Whose texts are in a call


FLOOD, GUEST = Tenant("flood"), Tenant("guest")


def many(n: int, tenant: Tenant, text: str = "the cat sleeps") -> PooledRequest:
    return PooledRequest((text,) * n, tenant=tenant)


def read_in(loop: PooledLoop, n_steps: int) -> dict:
    """Tokens that were read in so many steps, by request; none may end meanwhile."""
    counts: dict = {}
    for _ in range(n_steps):
        for id, output in loop.step():
            assert isinstance(output, Read)
            counts[id] = counts.get(id, 0) + output.n_tokens
    return counts


def nobody_is_counted_as_running(loop: PooledLoop) -> bool:
    return all(account.n_running == 0 for account in loop._queue._accounts.values())


def test_a_flood_of_one_key_leaves_others_their_share_of_the_queue(make_loop):
    loop = make_loop("bert", "mean", n_parallel=1, n_batch=16, max_queue=8)
    for number in range(9):
        loop.submit(number, many(50, FLOOD))
    with pytest.raises(QueueFull):
        loop.submit("one too many", many(1, FLOOD))
    for number in range(4):
        loop.submit(f"guest {number}", many(1, GUEST))
    with pytest.raises(QueueFull):
        loop.submit("guest, too", many(1, GUEST))
    ended = []
    for _ in range(8):
        ended += [id for id, _ in ends(loop.step())]
    assert ended == [f"guest {number}" for number in range(4)], "every other text is the guest's"


def test_tokens_are_shared_by_weight_whatever_the_number_of_requests_and_lengths_of_texts(make_loop):
    loop = make_loop("bert", "mean", n_batch=64, n_parallel=16)
    for number in range(5):
        loop.submit(f"light {number}", many(200, Tenant("light"), "cat"))
    loop.submit("heavy", many(400, Tenant("heavy", weight=3), "the cat sleeps " * 5))
    counts = read_in(loop, 40)
    light = sum(n_tokens for id, n_tokens in counts.items() if id != "heavy")
    assert 2.7 < counts["heavy"] / light < 3.3
    shares = [counts[f"light {number}"] for number in range(5)]
    assert max(shares) - min(shares) <= 3, "requests of one key take turns"


def test_priority_goes_first_and_lower_ones_go_on_after_it(make_loop):
    loop = make_loop("bert", "mean", n_batch=16, n_parallel=4)
    loop.submit("low", many(40, FLOOD))
    loop.step()
    loop.submit("high", many(20, Tenant("urgent", weight=0.01, priority=1)))
    seen = [id for _ in range(3) for id, _ in loop.step()]
    assert set(seen) == {"high"}
    found = []
    while not loop.idle:
        found += [id for id, _ in ends(loop.step())]
    assert found == ["high", "low"]


@pytest.mark.parametrize(("limit", "n_calls"), [(1, 6), (2, 3), (None, 1)])
def test_no_more_texts_of_a_key_are_in_a_call_than_it_may_run(make_loop, limit, n_calls):
    loop = make_loop("bert", "mean", n_parallel=8)
    for number in range(2):
        loop.submit(number, many(3, Tenant("slow", max_running=limit), "a"))
    steps = 0
    while not loop.idle:
        steps += 1
        loop.step()
    assert steps == n_calls
    assert nobody_is_counted_as_running(loop)


def test_a_keys_limit_leaves_the_rest_of_a_call_to_others(make_loop):
    loop = make_loop("bert", "mean", n_parallel=8)
    loop.submit("slow", many(5, Tenant("slow", max_running=1), "a"))
    loop.submit("fast", many(7, GUEST, "a"))
    assert [id for id, _ in ends(loop.step())] == ["fast"]


def test_a_text_that_cannot_be_read_takes_its_requests_others_out_of_the_call_and_of_the_account(make_loop):
    loop = make_loop("bert", "mean", n_batch=64, n_parallel=8)
    bad = PooledRequest(("a", "b", "c", "cat " * 95, "d"), tenant=FLOOD)
    loop.submit("bad", bad)
    loop.submit("good", many(8, GUEST, "a"))
    outputs = loop.step()
    assert [(id, type(output)) for id, output in outputs] == [("bad", InputTooLong), ("good", Pooled)]
    assert nobody_is_counted_as_running(loop)
    assert loop.idle
    assert len(loop._queue) == 0


def test_who_goes_away_leaves_nothing_in_the_queue(make_loop):
    loop = make_loop("bert", "mean", n_batch=16, n_parallel=2, max_queue=0)
    loop.submit(1, many(50, FLOOD))
    loop.submit(2, many(50, FLOOD))
    loop.step()
    for id in (1, 2):
        loop.cancel(id)
    assert loop.idle
    assert loop.step() == []
    assert len(loop._queue) == 0
    assert nobody_is_counted_as_running(loop)
    loop.submit(3, many(1, FLOOD))
    assert [id for id, _ in ends(loop.step())] == [3]


def test_what_was_read_is_told_after_each_call_and_the_sum_at_the_end(make_loop):
    loop = make_loop("bert", "mean", n_batch=16, n_parallel=8)
    loop.submit(1, many(10, GUEST, "a dog"))
    told = []
    while not loop.idle:
        told += [output for _, output in loop.step()]
    *before, last = told
    assert all(isinstance(each, Read) and 0 < each.n_tokens <= 16 for each in before)
    n_before = sum(each.n_tokens for each in before)
    assert len(before) == 2
    assert n_before < last.n_tokens == 10 * 4
    assert loop.counters.prompt_tokens_total == last.n_tokens


@pytest.mark.parametrize(("tenant", "field"), [
    (Tenant("a", weight=0), "tenant weight"),
    (Tenant("a", weight=float("nan")), "tenant weight"),
    (Tenant("a", priority=1001), "tenant priority"),
    (Tenant("a", max_running=0), "tenant max_running"),
    (Tenant("\ud800"), "tenant name"),
])  # fmt: skip
def test_a_tenant_that_is_none_is_refused_by_name(make_loop, tenant, field):
    loop = make_loop("bert", "mean")
    with pytest.raises(InvalidRequest) as caught:
        loop.submit(1, PooledRequest(("a",), tenant=tenant))
    assert caught.value.field == field
    assert loop.idle


def test_a_call_that_fails_is_split_and_only_the_guilty_request_fails(make_loop, monkeypatch):
    loop = make_loop("bert", "mean")
    guilty = loop.model.tokenize("guilty")
    honest = pooled.pool

    def pool(context, texts, width, *, goes_on):
        if guilty in texts:
            raise DecodeFailed(-3)
        return honest(context, texts, width, goes_on=goes_on)

    monkeypatch.setattr(pooled, "pool", pool)
    requests = [PooledRequest(("a", "the cat")), PooledRequest(("b", "guilty", "c")), PooledRequest(("d",))]
    first, second, third = run(loop, *requests)
    assert isinstance(second, DecodeFailed)
    assert (first.values.shape, third.values.shape) == ((2, tiny.WIDTH), (1, tiny.WIDTH))
    assert loop.stats().failed_total == 1
    assert nobody_is_counted_as_running(loop)


def test_values_that_are_no_numbers_fail_the_request(folder):
    path = folder / "nan.gguf"
    weights = tiny.bert_weights(head=False, seed=1)
    weights["blk.1.ffn_up.bias"][:] = np.nan
    writer = tiny._writer(path, "bert", "mean")
    writer.add_layer_norm_eps(1e-12)
    writer.add_causal_attention(False)
    writer.add_token_type_count(2)
    tiny._write(writer, weights)
    config = EngineConfig(path, kind="embedding", n_threads=1)
    with (
        Model.open(path) as model,
        ExitStack() as stack,
        pytest.raises(ModelLoadFailed, match="no numbers"),
    ):
        pooled.open_loop(model, config, stack)


@pytest.mark.parametrize(("file", "options", "words"), [
    (("bert", "rank", True), {"kind": "embedding"}, "ranks documents and embeds none"),
    (("bert", "mean", False), {"kind": "rerank"}, "ranks nothing"),
    (("bert", None, False), {}, "set pooling to mean, cls, last"),
    (("bert", "none", False), {}, "set pooling to mean, cls, last"),
])  # fmt: skip
def test_a_file_of_another_kind_is_refused(make_loop, file, options, words):
    architecture, pooling, head = file
    with pytest.raises(ModelLoadFailed, match=words):
        make_loop(architecture, pooling, head=head, **options)


@pytest.mark.parametrize(("options", "field"), [
    ({"kind": "image"}, "kind"),
    ({"pooling": "mean"}, "pooling"),
    ({"kind": "rerank", "pooling": "mean"}, "pooling"),
    ({"kind": "embedding", "pooling": "rank"}, "pooling"),
    ({"kind": "embedding", "pooling": "max"}, "pooling"),
    ({"kind": "embedding", "lora": ((Path("a.gguf"), 1.0),)}, "lora"),
])  # fmt: skip
def test_a_configuration_that_makes_no_sense_is_refused(options, field):
    with pytest.raises(InvalidRequest) as caught:
        EngineConfig(Path("model.gguf"), **options).validate()
    assert caught.value.field == field


def test_a_model_of_text_embeds_with_the_pooling_it_is_told(model, smollm2_gguf):
    with ExitStack() as stack:
        config = EngineConfig(smollm2_gguf, kind="embedding", pooling="last", n_ctx=256, n_threads=1)
        loop = pooled.open_loop(model, config, stack)
        rows = values(loop, "A cat sat on the mat.", "A cat is on a mat.", "Quarterly revenue grew.")
    assert rows.shape == (3, model.n_embd)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
