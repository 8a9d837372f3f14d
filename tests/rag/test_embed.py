"""The real embedder: vectors, spans, and the fingerprint that tells two models apart."""

import json
import shutil

import numpy as np
import pytest

from rag.collection import Collection
from rag.embed import Embedder, UnusableEmbedder
from rag.ingest import index


@pytest.fixture(scope="module")
def minilm(minilm_dir):
    return Embedder.load(minilm_dir)


def test_vectors_have_length_one_and_keep_the_order_of_their_texts(minilm):
    texts = ["a cat sat", "x " * 300, "parental leave is paid", "a cat sat"]
    seen = []
    vectors = minilm.documents(texts, lambda done, total: seen.append((done, total)))
    assert vectors.shape == (4, minilm.dimension) == (4, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(vectors[0], vectors[3], atol=1e-6)
    assert int(np.argmax(vectors @ minilm.queries(["time off for parents"])[0])) == 2
    assert seen == [(4, 4)]


def test_spans_cover_a_text_longer_than_the_model_reads_without_special_tokens(minilm):
    text = "naïve 육아휴직 👩‍👩‍👧 done. " * 300
    spans = minilm.spans(text)
    assert len(spans) > minilm.max_tokens
    assert spans == sorted(spans)
    assert text[spans[0][0] : spans[0][1]] == "naïve"
    assert minilm.window_tokens == minilm.max_tokens - 2 == 254
    assert minilm.count_tokens("hello world") == 4


def test_the_fingerprint_follows_content_not_folder_or_library(minilm, minilm_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(minilm_dir, copy)
    (copy / "README.md").write_text("other words")
    settings = copy / "config_sentence_transformers.json"
    settings.write_text(json.dumps({"__version__": {"sentence_transformers": "99"}}))
    assert Embedder.load(copy).fingerprint == minilm.fingerprint
    (copy / "1_Pooling/config.json").write_text('{"pooling_mode_cls_token": true}')
    assert Embedder.load(copy).fingerprint != minilm.fingerprint


def test_a_folder_that_is_no_embedder_is_one_error(tmp_path):
    with pytest.raises(UnusableEmbedder, match=r"neither modules\.json"):
        Embedder.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(UnusableEmbedder, match="does not load"):
        Embedder.load(tmp_path).queries(["a"])


@pytest.mark.parametrize("said", [383, 0, None])
def test_vectors_of_another_length_than_the_model_says_are_one_error(minilm_dir, monkeypatch, said):
    embedder = Embedder.load(minilm_dir)
    monkeypatch.setattr(embedder._model, "get_embedding_dimension", lambda: said)
    with pytest.raises(UnusableEmbedder, match=r"vectors .*lq pull"):
        embedder.queries(["a"])


def test_a_question_in_other_words_finds_its_passage(minilm, tmp_path):
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "leave.txt").write_text("Parents may stay at home for twelve weeks after a birth, fully paid.")
    (notes / "보증.txt").write_text("압력계의 보증 기간은 30개월입니다.", "utf-8")
    (notes / "noise.txt").write_text("The pressure tank is tested in March. Bolts are tightened to 17 Nm.")
    index(tmp_path / "c", [notes], embedder=minilm)
    collection = Collection.open(tmp_path / "c")
    found = [
        collection.search(question, k=1, embedder=minilm)[0].file
        for question in ("How much holiday do I get when my baby comes?", "압력계는 보증이 얼마나 됩니까?")
    ]
    collection.close()
    assert found == ["leave.txt", "보증.txt"]


def test_long_texts_are_tokenized_in_pieces_with_the_same_spans(minilm_dir, monkeypatch):
    embedder = Embedder.load(minilm_dir)
    text = "The tide table hangs in the wheelhouse; nobody reads it.\n" * 40
    whole = embedder.spans(text)
    monkeypatch.setattr("rag.embed._PIECE_CHARACTERS", 97)
    assert embedder.spans(text) == whole


def test_a_long_text_without_spaces_is_covered_from_end_to_end(minilm_dir, monkeypatch):
    monkeypatch.setattr("rag.embed._PIECE_CHARACTERS", 50)
    spans = Embedder.load(minilm_dir).spans("." * 333)
    assert [start for start, _ in spans] == list(range(333))
