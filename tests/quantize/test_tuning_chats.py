"""Chats become tokens of which exactly the assistant's are learnt; what is no chat is refused by its line."""

import json
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer

from quantize.tokenizer.files import TokenizerFiles
from quantize.tuning.chats import BadChat, NoChats, read_chats
from quantize.tuning.encoding import CannotEncode, Encoder, encode
from quantize.tuning.order import TooFewChats, held_out, learning_rate, micro_batches, steps

TURNS = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Quite well, thank you."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Still well!\n\nBye."},
]
ANSWERS = ["Quite well, thank you.", "Still well!\n\nBye."]
#: Tokenizer -> what ends an assistant's turn.
TEMPLATES = {
    "llama3": "<|eot_id|>",
    "gemma3": "<end_of_turn>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",
    "mistral_nemo": "</s>",
}
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)


def jsonl(path, *values):
    lines = [value if isinstance(value, str) else json.dumps(value) for value in values]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def chat(*turns, **more):
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


PLAIN = chat(("user", "Hello?"), ("assistant", "Hello."))


@cache
def loaded(folder):
    """Some have a quarter of a million tokens, which take seconds."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def encoder(folder, template=None, **values):
    files = TokenizerFiles.open(folder)
    added = files.added.values()
    found = {
        "checkpoint": folder,
        "template": template or files.chat_template,
        "tokenizer": loaded(folder),
        "bos_token": files.text_of("bos") or "",
        "eos_token": files.text_of("eos") or "",
        "first": None,
        "controls": tuple(token.text for token in added if token.special),
    }
    return Encoder(**found | values)


def learnt(made, examples) -> list[str]:
    """The text that counts, one a sequence."""
    return [
        made.tokenizer.decode(example.tokens[example.wanted].tolist(), skip_special_tokens=False)
        for example in examples
    ]


@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_what_the_assistant_writes_is_learnt_with_the_token_that_ends_it(
    name, tokenizer_dir, tmp_path
):
    made, end = encoder(tokenizer_dir(name)), TEMPLATES[name]
    chats = read_chats(jsonl(tmp_path / "chats.jsonl", {"messages": TURNS}))
    texts = learnt(made, made.examples(tmp_path, 0, chats[0]))
    if name == "qwen3":  # its template prints an empty thought, and takes it out of earlier turns
        assert texts == [f"<think>\n\n</think>\n\n{answer}{end}" for answer in ANSWERS]
    else:
        assert texts == ["".join(f"{answer}{end}" for answer in ANSWERS)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_comes_before_an_answer_is_the_prompt_that_a_server_would_send(name, tokenizer_dir, tmp_path):
    made = encoder(tokenizer_dir(name))
    chats = read_chats(jsonl(tmp_path / "chats.jsonl", {"messages": TURNS[:2]}))
    [example] = made.examples(tmp_path, 0, chats[0])
    prompt = made.tokenizer.encode(made._render(TURNS[:1], prompt=True), add_special_tokens=False).ids
    first = int(np.argmax(example.wanted))
    assert example.tokens[:first].tolist() == prompt
    assert example.wanted[first:].all()


def test_sentencepiece_answers_keep_the_space_that_belongs_to_them(tokenizer_dir, tmp_path):
    made = encoder(tokenizer_dir("llama2"), LLAMA2)
    chats = read_chats(jsonl(tmp_path / "chats.jsonl", {"messages": TURNS}))
    [example] = made.examples(tmp_path, 0, chats[0])
    texts = learnt(made, [example])
    assert texts == ["Quite well, thank you. </s> Still well!\n\nBye. </s>"]
    assert example.tokens[0] == 1  # the template's own <s>, not a second one
    assert (example.tokens[1:] == 1).sum() == 1


def test_a_first_token_that_the_template_lacks_is_put_there_and_not_learnt(tokenizer_dir, tmp_path):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    made = encoder(tokenizer_dir("llama2"), template, first=1)
    chats = read_chats(jsonl(tmp_path / "chats.jsonl", PLAIN))
    [example] = made.examples(tmp_path, 0, chats[0])
    assert example.tokens[0] == 1
    assert not example.wanted[0]
    assert learnt(made, [example]) == ["assistant: Hello.</s>"]  # it announces no answer, so all of it is one


def test_a_turn_of_weight_0_is_read_and_not_learnt(tokenizer_dir, tmp_path):
    made = encoder(tokenizer_dir("qwen2_5"))
    turns = [TURNS[0], TURNS[1] | {"weight": 0}, *TURNS[2:]]
    chats = read_chats(jsonl(tmp_path / "chats.jsonl", {"messages": turns}))
    examples = made.examples(tmp_path, 0, chats[0])
    assert learnt(made, examples) == [f"{ANSWERS[1]}<|im_end|>"]
    assert "Quite well" in made.tokenizer.decode(examples[0].tokens.tolist())


def test_a_control_token_written_in_a_message_is_refused(tokenizer_dir, tmp_path):
    path = jsonl(tmp_path / "chats.jsonl", PLAIN, chat(("user", "a<|im_end|>b"), ("assistant", "c")))
    with pytest.raises(BadChat, match=r"line 2: messages\[0\]\.content holds '<\|im_end\|>'"):
        list(encode(encoder(tokenizer_dir("qwen2_5")), read_chats(path), path, max_length=99).examples)


def test_messages_that_the_template_refuses_are_named_by_their_line(tokenizer_dir, tmp_path):
    path = jsonl(tmp_path / "chats.jsonl", chat(("user", "a"), ("user", "b"), ("assistant", "c")))
    with pytest.raises(BadChat, match=r"line 1: the chat template refuses.*alternate"):
        encode(encoder(tokenizer_dir("gemma3")), read_chats(path), path, max_length=99)


def test_long_chats_are_cut_and_those_without_an_answer_left_are_counted_out(tokenizer_dir, tmp_path):
    late = chat(("user", "word " * 50), ("assistant", "No."))
    long = chat(("user", "Hi"), ("assistant", "yes " * 50))
    path = jsonl(tmp_path / "chats.jsonl", late, long, PLAIN)
    made = encoder(tokenizer_dir("llama3"))
    found = encode(made, read_chats(path), path, max_length=40)
    assert [example.chat for example in found.examples] == [1, 2]
    assert len(found.examples[0].tokens) == 40
    assert (found.facts["n_cut"], found.facts["n_left_out"], found.facts["n_chats"]) == (2, 1, 3)
    assert found.facts["n_learnt"] == sum(int(example.wanted.sum()) for example in found.examples)


def test_chats_that_are_all_too_long_are_refused_with_the_length_that_would_do(tokenizer_dir, tmp_path):
    path = jsonl(tmp_path / "chats.jsonl", chat(("user", "word " * 50), ("assistant", "No.")))
    with pytest.raises(CannotEncode, match=r"within --max-length 20 \(the longest has \d+\); raise"):
        encode(encoder(tokenizer_dir("llama3")), read_chats(path), path, max_length=20)


BAD_LINES = {
    "not JSON": ('{"messages": [', r"line 2: is not JSON"),
    "no object": ([1], r"line 2: messages is missing"),
    "no messages": ({"prompt": "a"}, r"line 2: messages is missing; give"),
    "empty messages": ({"messages": []}, r"messages is '\[\]'"),
    "messages no list": ({"messages": "Hello"}, r"messages is 'Hello'"),
    "message no object": ({"messages": ["a"]}, r"messages\[0\] is 'a'; give an object"),
    "unknown role": (
        chat(("human", "a"), ("assistant", "b")),
        r"messages\[0\]\.role is 'human'; give one of",
    ),
    "tool turn": (chat(("tool", "a"), ("assistant", "b")), r"role is 'tool'"),
    "no assistant": (chat(("user", "a")), r"no assistant turn to learn from \(roles: user\)"),
    "no text": (chat(("user", None), ("assistant", "b")), r"messages\[0\]\.content is 'null'"),
    "parts": (chat(("user", [{"type": "image_url"}]), ("assistant", "b")), r"image_url.*as a string"),
    "empty answer": (chat(("user", "a"), ("assistant", " ")), r"messages\[1\]\.content is empty"),
    "weight": (
        {"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]},
        r"messages\[0\]\.weight is '0.5'; give 1",
    ),
    "tool call": (
        {"messages": [{"role": "assistant", "content": "a", "tool_calls": [1]}]},
        r"messages\[0\]\.tool_calls is '\[1\]', which is not supported",
    ),
    "tools": (PLAIN | {"tools": [{"type": "function"}]}, r"line 2: tools are not supported"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_line_that_is_no_chat_is_named_with_field_value_and_remedy(case, tmp_path):
    line, message = BAD_LINES[case]
    path = jsonl(tmp_path / "chats.jsonl", PLAIN, line)
    with pytest.raises(BadChat, match=message) as raised:
        read_chats(path)
    assert str(raised.value).startswith(f"{path}, line 2: ")
    assert "; " in str(raised.value)


def test_a_file_that_is_not_there_empty_or_not_text_is_refused(tmp_path):
    with pytest.raises(NoChats, match="no such file"):
        read_chats(tmp_path / "none.jsonl")
    with pytest.raises(NoChats, match="is a folder"):
        read_chats(tmp_path)
    with pytest.raises(NoChats, match="empty"):
        read_chats(jsonl(tmp_path / "empty.jsonl", "", " "))
    (tmp_path / "bytes.jsonl").write_bytes(json.dumps(PLAIN).encode() + b"\n\xff\n")
    with pytest.raises(BadChat, match=r"line 2: byte \d+ is not UTF-8"):
        read_chats(tmp_path / "bytes.jsonl")


def test_line_separators_within_a_text_end_no_line(tmp_path):
    text = json.dumps(chat(("user", "a\u2028b"), ("assistant", "c")), ensure_ascii=False)
    assert read_chats(jsonl(tmp_path / "chats.jsonl", text))[0].messages[0].content == "a\u2028b"


def test_equal_chats_are_held_out_together_and_the_split_follows_the_seed():
    texts = ["a", "b", "a", "c", "d", "a", "e"]
    for seed in range(20):
        apart = held_out(texts, share=0.4, seed=seed)
        assert {texts[i] for i in apart}.isdisjoint(texts[i] for i in range(7) if i not in apart)
        assert 1 <= len(apart) < len(texts)
        assert apart == held_out(texts, share=0.4, seed=seed)
    assert len({held_out(texts, share=0.4, seed=seed) for seed in range(20)}) > 1
    assert held_out(texts, share=0, seed=0) == frozenset()


def test_one_chat_said_twice_leaves_nothing_to_hold_out():
    with pytest.raises(TooFewChats, match=r"1 different chat, .*--held-out 0"):
        held_out(["a", "a"], share=0.1, seed=0)


def test_every_epoch_takes_each_sequence_once_in_its_own_order():
    epochs = [steps(10, batch_size=4, seed=3, epoch=epoch) for epoch in range(2)]
    for made in epochs:
        assert [len(step) for step in made] == [4, 4, 2]
        assert sorted(index for step in made for index in step) == list(range(10))
    assert epochs[0] != epochs[1]
    assert epochs[0] == steps(10, batch_size=4, seed=3, epoch=0)


def test_micro_batches_hold_all_of_a_step_within_the_limit():
    lengths = [5, 90, 10, 9, 40, 200]
    made = micro_batches(lengths, range(6), limit=100)
    assert sorted(index for batch in made for index in batch) == list(range(6))
    assert [5] in made  # longer than the limit: alone
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in made if batch != [5])


def test_the_learning_rate_rises_then_falls_to_nothing():
    rates = [learning_rate(step, n_steps=20, n_warm=4, peak=1.0) for step in range(20)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(left > right for left, right in pairwise(rates[4:]))
    assert 0 < rates[-1] < 0.02
