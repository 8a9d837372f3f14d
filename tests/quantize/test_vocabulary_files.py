"""Every way a folder may describe its tokenizer ends in the right GGUF keys."""

import json
import shutil

import pytest
from gguf import TokenType

from quantize.convert import convert
from quantize.general import fitting_name, strip_notes
from quantize.tokenizer.pieces import UnsupportedTokenizer
from quantize.tokenizer.pretokenizer import UnknownPretokenizer
from quantize.tokenizer.sentencepiece_model import InvalidSentencePiece, read_sentencepiece
from quantize.tokenizer.special_tokens import UnsupportedTemplate
from quantize.tokenizer.vocabulary import read_vocabulary


@pytest.fixture
def folder(tokenizer_dir, tmp_path):
    """A function: a copy of a real tokenizer's folder, free to be changed."""
    return lambda name: shutil.copytree(tokenizer_dir(name), tmp_path / name)


def change(path, **values):
    """Change keys of a JSON file, made where there is none."""
    found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**found, **values}, ensure_ascii=False), "utf-8")


def read(path, *, n_vocab=32_000, **options):
    return read_vocabulary(path, n_vocab=n_vocab, config={}, **options)


def types_of(vocabulary, *texts):
    found = {piece.text: TokenType(piece.type).name for piece in vocabulary.pieces}
    return [found[text] for text in texts]


PIECES = [("<unk>", 0, 2), ("<s>", 0, 3), ("</s>", 0, 3), ("<0x0A>", 0, 6), ("▁a", -1.5, 1), ("가", -2, 1)]


def test_tokenizer_model_is_read_without_sentencepiece(tmp_path, sentencepiece_model):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model([*PIECES, ("[X]", 0, 4)], prefix=0))
    vocabulary = read(tmp_path, n_vocab=10)
    assert [piece.text for piece in vocabulary.pieces][4:8] == ["▁a", "가", "[X]", "[PAD7]"]
    assert [piece.score for piece in vocabulary.pieces][4:6] == [-1.5, -2.0]
    assert types_of(vocabulary, "<unk>", "</s>", "<0x0A>", "가", "[X]", "[PAD9]") == [
        "UNKNOWN",
        "CONTROL",
        "BYTE",
        "NORMAL",
        "USER_DEFINED",
        "UNUSED",
    ]
    assert (vocabulary.model, vocabulary.pre, vocabulary.adds_space_prefix) == ("llama", "default", False)


def test_tokenizer_model_and_tokenizer_json_give_the_same_vocabulary(folder, sentencepiece_model):
    path = folder("llama2")
    alone = read(path)
    pieces = [(piece.text, piece.score, min(int(piece.type), 6)) for piece in alone.pieces]
    (path / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    assert read(path).pieces == alone.pieces


def test_scores_follow_the_order_of_the_merges(tokenizer_dir):
    vocabulary = read(tokenizer_dir("llama2"))
    texts = [piece.text for piece in vocabulary.pieces]
    assert texts[261:264] == ["▁t", "in", "er"]
    assert [vocabulary.pieces[texts.index(text)].score for text in ("▁t", "in", "er")] == [0.0, -1.0, -2.0]
    assert vocabulary.pieces[texts.index("가")].score < vocabulary.pieces[texts.index("▁▁")].score
    assert types_of(vocabulary, "<0x00>", "<unk>", "</s>", "▁the") == ["BYTE", "CONTROL", "CONTROL", "NORMAL"]


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda data: data[:-3], "no SentencePiece model"),
        (lambda _: b"\xff" * 40, "no SentencePiece model"),
        (lambda _: b"", "no pieces"),
        (lambda _: b"IQ== 0\nIg== 1\n", "no SentencePiece model|no pieces"),
    ],
)
def test_damaged_tokenizer_model_is_refused(damage, problem, tmp_path, sentencepiece_model):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damage(sentencepiece_model(PIECES)))
    with pytest.raises(InvalidSentencePiece, match=problem):
        read_sentencepiece(path)


def test_tokenizer_model_of_another_algorithm_is_refused(tmp_path, sentencepiece_model):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(PIECES, algorithm=1))
    with pytest.raises(InvalidSentencePiece, match="model type 1"):
        read_sentencepiece(path)


def test_mistrals_tokenizer_model_gives_llamas_tokens_ten_further_and_control_tokens_in_text(
    make_tiny, mistral_v3_model, tmp_path
):
    from tokenizers import Tokenizer

    from engine.llama import Model

    tiny = make_tiny("MistralConfig", "llama2", pad=10, num_hidden_layers=1)
    reference = Tokenizer.from_file(str(tiny.path / "tokenizer.json"))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tiny.path / file).unlink()
    (tiny.path / "tokenizer.model").write_bytes(mistral_v3_model)
    metadata = convert(tiny.path, tmp_path / "tiny.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert (metadata["tokenizer.ggml.bos_token_id"], metadata["tokenizer.ggml.eos_token_id"]) == (1, 2)
    with Model.open(tmp_path / "tiny.gguf", vocab_only=True) as model:
        for text in ("Hello world", "  two spaces", "안녕하세요, 세계!", "🚀 x²\n\tif (x) {}", "1234.5"):
            ids = reference.encode(text, add_special_tokens=False).ids
            shifted = [token_id if token_id < 3 else token_id + 10 for token_id in ids]
            assert model.tokenize(text, add_special=False, parse_special=False) == shifted, text
        asked = model.tokenize("[INST]hi[/INST]", add_special=True, parse_special=True)
        assert (asked[:2], asked[-1]) == ([1, 3], 4)


def test_gpt4os_rule_is_recognised_by_its_words_and_its_swallowing_tokens_are_noted(phi4_tokenizer, tmp_path):
    vocabulary = read(phi4_tokenizer, n_vocab=2005)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "gpt-4o")
    assert types_of(vocabulary, "<|endoftext|>", "<|assistant|>") == ["CONTROL", "CONTROL"]
    (note,) = strip_notes(vocabulary)
    assert "swallow the spaces" in note
    assert fitting_name("Phi-4-mini", vocabulary) == "Phi-4-mini"
    other = shutil.copytree(phi4_tokenizer, tmp_path / "other")
    change(other / "tokenizer.json", normalizer={"type": "Lowercase"})
    with pytest.raises(UnknownPretokenizer, match="unknown rule"):
        read(other, n_vocab=2005)
    assert "(Lowercase)" in read(other, n_vocab=2005, pre="gpt-4o").notes[0]


def test_normalizing_that_llama_cpp_does_not_do_is_noted(tokenizer_dir, folder):
    (note,) = read(tokenizer_dir("qwen3"), n_vocab=151_936).notes
    assert note.startswith("The tokenizer normalizes texts (NFC), llama.cpp does not")
    for name, n_vocab in (("llama2", 32_000), ("gemma3", 262_208), ("mistral_nemo", 131_072)):
        assert read(tokenizer_dir(name), n_vocab=n_vocab).notes == (), name
    path = folder("llama2")
    normalizer = json.loads((path / "tokenizer.json").read_text("utf-8"))["normalizer"]
    normalizer["normalizers"].append({"type": "NFKC"})
    change(path / "tokenizer.json", normalizer=normalizer)
    assert "(NFKC)" in read(path).notes[0]


@pytest.mark.parametrize(
    ("name", "n_vocab", "pre", "adds_bos"),
    [
        ("llama3", 128_256, "smaug-bpe", False),  # llama.cpp's name for Llama 3 without a first token
        ("llama3_2", 128_256, "llama-bpe", True),
        ("qwen2_5", 151_936, "qwen2", False),
        ("qwen3", 151_936, "qwen2", False),
        ("mistral_nemo", 131_072, "tekken", True),
    ],
)
def test_splitting_rule_and_first_token_of_real_tokenizers(name, n_vocab, pre, adds_bos, tokenizer_dir):
    vocabulary = read(tokenizer_dir(name), n_vocab=n_vocab)
    assert (vocabulary.pre, vocabulary.special.adds_bos, vocabulary.special.adds_eos) == (
        pre,
        adds_bos,
        False,
    )
    assert len(vocabulary.pieces) == n_vocab


def test_rule_is_recognised_when_the_vocabulary_is_not(folder):
    """A tokenizer with other ids has another hash and the same rule."""
    path = folder("qwen2_5")
    text = (path / "tokenizer.json").read_text("utf-8")
    spec = json.loads(text)
    vocab = spec["model"]["vocab"]
    vocab["3"], vocab["4"] = vocab["4"], vocab["3"]
    (path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    assert read(path, n_vocab=151_936).pre == "qwen2"


def test_unknown_rule_is_refused_and_pre_names_it(folder):
    path = folder("qwen2_5")
    letters = {"type": "Split", "pattern": {"String": "e"}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    rule = {"type": "Sequence", "pretokenizers": [letters, to_bytes]}
    change(path / "tokenizer.json", pre_tokenizer=rule)
    with pytest.raises(UnknownPretokenizer, match=r"unknown rule .*; name the rule with --pre.* qwen2"):
        read(path, n_vocab=151_936)
    assert read(path, n_vocab=151_936, pre="qwen2").pre == "qwen2"
    with pytest.raises(UnknownPretokenizer, match="--pre qwen9 is no rule"):
        read(path, n_vocab=151_936, pre="qwen9")


def test_added_tokens_are_control_or_user_defined(tokenizer_dir):
    qwen = read(tokenizer_dir("qwen3"), n_vocab=151_936)
    assert types_of(qwen, "<|im_end|>", "<think>", "<|fim_pad|>", "hello", "[PAD151935]") == [
        "CONTROL",
        "USER_DEFINED",
        "CONTROL",
        "NORMAL",
        "UNUSED",
    ]


def test_stop_tokens_that_llama_cpp_does_not_know_by_name_become_turn_ends(folder):
    path = folder("llama2")
    change(path / "generation_config.json", eos_token_id=[2, 300, 301])
    ids = read(path).special.ids
    assert (ids["eos"], ids["eot"], ids["eom"]) == (2, 300, 301)


def test_stop_tokens_that_llama_cpp_knows_need_no_key(folder):
    path = folder("llama3_2")
    change(path / "generation_config.json", eos_token_id=[128_001, 128_008, 128_009])
    ids = read(path, n_vocab=128_256).special.ids
    assert ids["eos"] == 128_009
    assert not {"eot", "eom"} & ids.keys()


def test_template_that_adds_an_end_token_says_so(folder):
    path = folder("llama2")
    spec = json.loads((path / "tokenizer.json").read_text("utf-8"))
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    spec["post_processor"]["single"].append(end)
    spec["post_processor"]["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
    change(path / "tokenizer.json", post_processor=spec["post_processor"])
    special = read(path).special
    assert (special.adds_bos, special.adds_eos, special.ids["eos"]) == (True, True, 2)
    spec["post_processor"]["single"].append(end)
    change(path / "tokenizer.json", post_processor=spec["post_processor"])
    with pytest.raises(UnsupportedTemplate, match="one before and one after"):
        read(path)


def test_chat_template_is_found_in_each_of_its_places(folder):
    path = folder("llama2")
    assert read(path).chat_template is None
    change(path / "tokenizer_config.json", chat_template="from config")
    assert read(path).chat_template == "from config"
    change(path / "chat_template.json", chat_template="from json")
    assert read(path).chat_template == "from json"
    (path / "chat_template.jinja").write_text("from jinja")
    assert read(path).chat_template == "from jinja"
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert [one["name"] for one in read(path).chat_template or []] == ["default", "tool_use"]


def test_padding_and_truncation_saved_with_a_tokenizer_change_nothing(folder, tokenizer_dir):
    path = folder("qwen2_5")
    padding = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 151_643, "pad_type_id": 0, "pad_token": "<|endoftext|>"}
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    change(path / "tokenizer.json", padding=padding, truncation=truncation)
    plain, saved = read(tokenizer_dir("qwen2_5"), n_vocab=151_936), read(path, n_vocab=151_936)
    assert (saved.pre, saved.special) == (plain.pre, plain.special)


def test_post_processor_that_does_not_keep_the_text_is_refused(folder):
    path = folder("llama2")
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    processor = {"type": "TemplateProcessing", "single": [begin], "pair": [begin]}
    processor["special_tokens"] = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    change(path / "tokenizer.json", post_processor=processor)
    with pytest.raises(UnsupportedTokenizer, match="its post-processor turns"):
        read(path)


@pytest.mark.parametrize(("scheme", "noted"), [("first", True), ("always", False), ("never", False)])
def test_space_before_the_first_word_only_is_noted(scheme, noted, folder):
    path = folder("llama2")
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    change(path / "tokenizer.json", normalizer=None, pre_tokenizer=step)
    vocabulary = read(path)
    assert vocabulary.adds_space_prefix is (scheme != "never")
    assert any("after every special token too" in note for note in vocabulary.notes) is noted


def test_tokens_beyond_the_embedding_are_left_out_and_noted(folder):
    path = folder("llama2")
    change(path / "added_tokens.json", **{"[EXTRA]": 32_000})
    vocabulary = read(path)
    assert len(vocabulary.pieces) == 32_000
    assert vocabulary.notes == (
        "1 tokens have no row among the embedding's 32000 and are left out: '[EXTRA]'.",
    )
    assert read(path, foreign=frozenset({"[EXTRA]"})).notes == ()
    assert read(path, n_vocab=32_001).pieces[32_000].text == "[EXTRA]"


def test_phi3_gets_the_name_by_which_llama_cpp_strips_spaces(phi3_tokenizer, tokenizer_dir):
    phi = read(phi3_tokenizer, n_vocab=32_064)
    assert fitting_name("My Model", phi) == "Phi-3 My Model"
    assert fitting_name("phi-3-mini", phi) == "phi-3-mini"
    assert strip_notes(phi) == ()
    assert fitting_name("Not phi3 at all", read(tokenizer_dir("llama2"))) == "Not phi 3 at all"


def test_general_keys_name_the_model_and_its_licence(checkpoint, tmp_path):
    folder = checkpoint.rename(tmp_path / "Tiny-Llama-8M-Instruct")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [ko, en]\n---\n# Tiny\n")
    metadata = convert(folder, tmp_path / "out.gguf").metadata
    assert metadata["general.name"] == "Tiny Llama 8M Instruct"
    assert metadata["general.license"] == "apache-2.0"
    assert metadata["general.type"] == "model"
    assert metadata["general.quantization_version"] == 2
    assert metadata["general.size_label"]
