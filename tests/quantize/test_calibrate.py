"""Self-written conversations: who is asked, what is kept, what is dropped, and resuming. No model runs."""

import json
from dataclasses import dataclass, field

import pytest
from tokenizers import Tokenizer

from engine.llama import Model
from engine.request import Delta, Done, EngineError, GenerationRequest
from quantize.calibration.calibrate import (
    PLAIN_TEMPERATURES,
    TEMPERATURES,
    NoUsableText,
    Plan,
    avoiding,
    converse,
)
from quantize.calibration.conversation import Conversation, Journal, Span, read, windows
from quantize.calibration.filters import Seen, fault, repeated_share
from quantize.calibration.texts import openings_of
from quantize.errors import QuantizeError
from quantize.frame import Frame, NothingToBeginFrom, UnusableTemplate, why_mute
from quantize.measure import passages

END = 2
FRAME = Frame(before=(1, 10), between=(END, 11), after=(END, 12))
PLAN = Plan("calibration", 7, 60, n_parallel=3)


@dataclass
class FakeWriter:
    """Answers each request in one step with what `say` makes of it; tokens None means it never ends."""

    say: object = None
    requests: dict[str, GenerationRequest] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    most: int = 0

    def submit(self, id, request):
        assert id not in self.requests
        self.requests[id] = request
        self.waiting.append(id)
        self.most = max(self.most, len(self.waiting))

    def step(self):
        id = self.waiting.pop(0)
        number, turn = (int(part) for part in id.split("-")[1:])
        tokens = self.say(number, turn) if self.say else [100 + number, 200 + turn, 300 + number, 400]
        ended = tokens is not None
        tokens = tokens or [1, 2, 3]
        done = Done("stop" if ended else "length", 1, len(tokens), stop_token=END if ended else None)
        text = Delta(" ".join(map(str, tokens)), tuple(tokens))
        return [(id, text), (id, done)]


def run(tmp_path, writer, *, frame=FRAME, plan=PLAN, key="k", **options):
    journal = Journal.open(tmp_path / "talk.jsonl", key=key)
    converse(writer, frame, plan, journal, **options)
    return journal


def test_question_is_written_after_the_open_turn_and_answered_within_the_template(tmp_path):
    writer = FakeWriter()
    journal = run(tmp_path, writer)
    assert writer.requests["calibration-0-0"].prompt == FRAME.before
    assert writer.requests["calibration-0-1"].prompt == (1, 10, 100, 200, 300, 400, END, 11)
    first = next(c for c in journal.accepted if c.number == 0)
    assert first.tokens == (1, 10, 100, 200, 300, 400, END, 11, 100, 201, 300, 400, END, 12)
    roles = [(span.role, span.n_tokens) for span in first.spans]
    assert roles == [("template", 2), ("user", 4), ("template", 2), ("assistant", 5), ("template", 1)]
    assert list(first.positions("assistant")) == [8, 9, 10, 11, 12]


def test_temperatures_are_mixed_and_questions_are_asked_warm(tmp_path):
    writer = FakeWriter()
    run(tmp_path, writer)
    answers = {writer.requests[f"calibration-{n}-1"].sampling.temperature for n in range(4)}
    questions = {writer.requests[f"calibration-{n}-0"].sampling.temperature for n in range(4)}
    assert answers == set(TEMPERATURES)
    assert min(questions) == 1.0


def test_seeds_of_calibration_and_evaluation_are_disjoint():
    def seeds(purpose):
        plan = Plan(purpose, 3, 100)
        return {plan.request_seed(number, turn) for number in range(5000) for turn in (0, 1)}

    assert len(seeds("calibration")) == 10_000
    assert not seeds("calibration") & seeds("evaluation")


def test_it_writes_side_by_side_until_enough_is_kept_and_finishes_what_it_began(tmp_path):
    writer = FakeWriter()
    plan = Plan("calibration", 7, 1000, n_parallel=3)
    journal = run(tmp_path, writer, plan=plan)
    assert 1000 <= sum(len(c.tokens) for c in journal.accepted) < 1000 + 3 * 14
    assert writer.most == plan.n_parallel
    assert not writer.waiting
    begun = {int(id.split("-")[1]) for id in writer.requests}
    assert journal.numbers == begun


def test_bad_turns_are_dropped_and_counted_by_reason(tmp_path):
    loop = [5, 6] * 30

    def say(number, turn):
        bad = {(0, 0): None, (1, 0): [9], (2, 0): loop, (3, 1): None, (4, 1): loop, (5, 1): []}
        return bad.get((number, turn), [100 + number, 200 + turn, 300 + number, 400])

    writer = FakeWriter(lambda n, t: [9] if (n, t) == (5, 1) else say(n, t))
    journal = run(tmp_path, writer)
    assert journal.reasons() == {
        "endless question": 1,
        "empty question": 1,
        "repetitive question": 1,
        "endless answer": 1,
        "repetitive answer": 1,
        "empty answer": 1,
    }
    assert not {0, 1, 2, 3, 4, 5} & {c.number for c in journal.accepted}


def test_the_same_question_is_asked_once_also_across_calibration_and_evaluation(tmp_path):
    seen = Seen()
    seen.add(list(range(50, 70)))

    def say(number, turn):
        if turn == 0 and number in (0, 1):
            return list(range(50, 70 if number == 0 else 69))  # held already, and nearly so
        if turn == 0 and number in (2, 3):
            return [7, 8, 9, 10]
        return [100 + number, 200 + turn, 300 + number, 400]

    journal = run(tmp_path, FakeWriter(say), seen=seen)
    assert journal.reasons() == {"duplicate question": 3}


def test_a_model_that_writes_nothing_usable_is_told_so(tmp_path):
    with pytest.raises(NoUsableText, match=r"200 empty question.*--calibration FILE .* --eval-text FILE"):
        run(tmp_path, FakeWriter(lambda *_: [9]))


def test_a_base_model_writes_plain_text_from_bos(tmp_path):
    writer = FakeWriter(lambda number, _: None if number % 2 else [100 + number, 5, 300 + number])
    journal = run(tmp_path, writer, frame=None, bos=1)
    assert writer.requests["calibration-0-0"].prompt == (1,)
    assert {c.spans[0] for c in journal.accepted} == {Span("template", 1)}
    assert all(c.tokens[0] == 1 and c.count("assistant") == 3 for c in journal.accepted)


def test_a_base_model_does_not_repeat_a_text_that_is_to_be_avoided(tmp_path):
    first = run(tmp_path, FakeWriter(), frame=None, bos=1).accepted
    (tmp_path / "other").mkdir()

    def say(number, _turn):
        old = number < len(first)
        return list(first[number].tokens[1:]) if old else [900 + number, 5, 300 + number, 7]

    journal = run(tmp_path / "other", FakeWriter(say), frame=None, bos=1, seen=avoiding(first))
    assert not {c.tokens for c in journal.accepted} & {c.tokens for c in first}
    assert sum(journal.reasons().values()) == len(first)


def test_every_other_piece_is_plain_text_where_there_is_something_to_begin_it_with(tmp_path):
    openings = [(1, 50), (1, 51), (1, 52)]
    writer = FakeWriter(lambda n, t: [100 + n, 200 + t, 300 + n, 400] if n != 2 else None)
    plan = Plan("calibration", 7, 300, n_parallel=3)
    journal = run(tmp_path, writer, plan=plan, openings=openings)
    plain = {c.number: c for c in journal.accepted if not c.count("user")}
    assert set(plain) == {n for n in journal.numbers if n % 4 in (2, 3)}  # 2 never ends, and may be cut
    assert {c.tokens[:2] for c in plain.values()} <= set(openings)
    assert len({c.tokens[:2] for c in plain.values()}) > 1
    hot = {writer.requests[f"calibration-{number}-0"].sampling.temperature for number in plain}
    assert hot == set(PLAIN_TEMPERATURES)
    for number, text in plain.items():
        assert writer.requests[f"calibration-{number}-0"].prompt == text.tokens[:2]
        assert text.spans[0] == Span("template", 2)
        assert text.tokens[2:] == tuple(text.tokens[i] for i in text.positions("assistant"))
    again = run(tmp_path / "again", FakeWriter(writer.say), plan=plan, openings=openings)
    assert sorted(c.tokens for c in again.accepted) == sorted(c.tokens for c in journal.accepted)


def test_plain_text_begins_with_the_vocabularys_most_frequent_words(smollm2_gguf):
    with Model.open(smollm2_gguf, n_gpu_layers=0, vocab_only=True) as model:
        openings = openings_of(model)
        words = [model.detokenize(opening) for opening in openings]
        assert not model.adds_bos
        assert openings[0] == tuple(model.tokenize("The", add_special=False))
    assert len(set(words)) == len(words) > 4000
    assert {"The", "This", "However", "American"} <= set(words)
    assert all(word.isalpha() and not word[0].islower() for word in words)


@dataclass
class FakeVocabulary:
    """Pieces by token id, of a model that begins texts with BOS."""

    pieces: list[bytes]
    bos_id: int = 0
    adds_bos: bool = True

    @property
    def n_vocab(self):
        return len(self.pieces)

    def piece(self, token):
        return self.pieces[token]

    def tokenize(self, text, *, add_special):
        assert not add_special
        return [self.pieces.index(b" " + text.encode())]


def test_openings_are_words_as_a_text_begins_with_them_after_bos():
    others = [b"<s>", b"the", b" of", b"A", b"NASA", b"12", b"\xe4\xb8", b" The."]
    words = [f" W{chr(97 + n // 26)}{chr(97 + n % 26)}".encode() for n in range(100)]
    found = openings_of(FakeVocabulary([*others, *words]))
    assert found == [(0, len(others) + n) for n in range(100)]
    assert openings_of(FakeVocabulary([*others, *words[1:]])) == []


def test_without_template_and_bos_there_is_nothing_to_begin_from(tmp_path):
    with pytest.raises(NothingToBeginFrom, match="neither a chat template nor a BOS"):
        run(tmp_path, FakeWriter(), frame=None, bos=None)


def test_an_engine_error_is_not_swallowed(tmp_path):
    class Failing(FakeWriter):
        def step(self):
            return [(self.waiting.pop(0), EngineError("the cache is gone"))]

    with pytest.raises(EngineError, match="the cache is gone"):
        run(tmp_path, Failing())


def test_an_interrupted_run_goes_on_with_the_numbers_that_are_missing(tmp_path):
    class Interrupted(FakeWriter):
        def step(self):
            if len(self.requests) > 6:
                raise KeyboardInterrupt
            return super().step()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Interrupted())
    before = read(tmp_path / "talk.jsonl")
    assert before
    with (tmp_path / "talk.jsonl").open("a") as file:
        file.write('{"number": 99, "seed"')  # killed while writing
    writer = FakeWriter()
    journal = run(tmp_path, writer)
    assert {c.number for c in before} < journal.numbers
    assert not {f"calibration-{c.number}-0" for c in before} & set(writer.requests)
    whole = run(tmp_path / "other", FakeWriter())
    assert {c.number: c.tokens for c in read(journal.path)} == {c.number: c.tokens for c in whole.accepted}


def test_a_file_of_another_key_is_begun_anew(tmp_path):
    run(tmp_path, FakeWriter(), key="old")
    journal = Journal.open(tmp_path / "talk.jsonl", key="new")
    assert not journal.numbers
    assert read(journal.path) == []


def test_junk_in_place_of_the_file_is_begun_anew_and_never_read_as_conversations(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_bytes(b"\xff\xfe not json\n")
    with pytest.raises(QuantizeError, match="not a conversation file"):
        read(path)
    assert not Journal.open(path, key="k").accepted


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\r", "\n"])
def test_a_character_that_some_take_for_a_line_end_stays_in_its_line(character, tmp_path):
    path = tmp_path / "talk.jsonl"
    text = f"one{character}two"
    spoken = Conversation(0, 1, 0.5, (1, 2, 3), (Span("assistant", 3),), assistant=text)
    Journal.open(path, key="k").add(spoken)
    continued = Journal.open(path, key="k")
    assert continued.accepted == [spoken]
    continued.reject(1, "empty answer")
    assert read(path) == [spoken]
    assert Journal.open(path, key="k").numbers == {0, 1}


def test_loops_are_told_from_text_by_their_repeated_grams():
    assert repeated_share([1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert repeated_share([1, 2] * 20) > 0.9
    assert fault([1, 2] * 20, "x", ended=True) == "repetitive"
    assert fault(list(range(40)), "x", ended=True) is None
    assert fault([1, 2] * 5, "x", ended=True) is None  # too short to call a loop
    assert fault([1, 2, 3, 4], "  \n", ended=True) == "empty"


def test_template_is_cut_into_three_at_the_two_turns():
    template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    frame = Frame.of(template, lambda s: [ord(c) for c in s], bos_token="^", eos_token="$", add_bos=94)
    told = ["".join(map(chr, part)) for part in (frame.before, frame.between, frame.after)]
    assert told == ["^[user]", "[end][assistant]", "[end]"]


def test_bos_is_added_only_where_the_template_lacks_it():
    template = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    frame = Frame.of(template, lambda s: [ord(c) for c in s], bos_token="", eos_token="", add_bos=94)
    assert frame.before == (94, ord("<"))


def test_template_without_the_answer_is_refused():
    template = "{% for m in messages %}{% if m.role == 'user' %}<{{ m.content }}>{% endif %}{% endfor %}"
    with pytest.raises(UnusableTemplate, match="does not print the assistant's message"):
        Frame.of(template, lambda s: [ord(c) for c in s], bos_token="", eos_token="", add_bos=None)


#: As Qwen3 writes it: no thought where none is wanted, an open answer where one may come.
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}[end]{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)


def test_a_model_that_may_think_answers_without_a_thought():
    frame = Frame.of(THINKING, lambda s: [ord(c) for c in s], bos_token="", eos_token="", add_bos=None)
    told = ["".join(map(chr, part)) for part in (frame.before, frame.between, frame.after)]
    assert told == ["[user]", "[end][assistant]<think></think>", "[end]"]


def test_qwen3s_own_template_frames_an_answer_after_a_closed_thought(tokenizer_dir):
    folder = tokenizer_dir("qwen3")
    template = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    assert "enable_thinking" in template
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    frame = Frame.of(
        template,
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        bos_token="",
        eos_token="<|im_end|>",
        add_bos=None,
    )
    told = [tokenizer.decode(part, skip_special_tokens=False) for part in (frame.before, frame.between)]
    assert told[0] == "<|im_start|>user\n"
    assert told[1] == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert tokenizer.decode(frame.after, skip_special_tokens=False) == "<|im_end|>\n"
    around = [*frame.before, *frame.between, *frame.after]
    opened, closed = (around.count(tokenizer.token_to_id(text)) for text in ("<think>", "</think>"))
    assert opened == closed == 1


def test_a_template_that_says_in_front_whether_to_think_is_usable():
    template = "{% if enable_thinking is undefined or enable_thinking %}/think{% else %}/no_think{% endif %}"
    template += "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    frame = Frame.of(template, lambda s: [ord(c) for c in s], bos_token="", eos_token="", add_bos=None)
    assert "".join(map(chr, frame.before)) == "/no_think<"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("fixed", "does not print the user's message"),
        ("{{ raise_exception('no') }}", "refuses these messages: no"),
        ("{% for %}", "not valid Jinja"),
        ("{{ messages[0].content }}", "does not print the assistant's message"),
    ],
)
def test_why_a_template_is_of_no_use_is_known_without_a_model(template, reason):
    assert reason in (why_mute(template, bos_token="<s>", eos_token="</s>") or "")


def test_a_model_with_a_first_token_or_a_good_template_can_write():
    assert why_mute(None, bos_token="<s>", eos_token=None) is None
    assert why_mute(THINKING, bos_token=None, eos_token=None) is None
    assert "neither a chat template nor a BOS" in (why_mute(None, bos_token=None, eos_token="x") or "")


def test_windows_spread_over_the_text_and_carry_bos():
    cut = windows(list(range(100, 200)), size=11, limit=33, bos=1)
    assert [(w.tokens[0], w.tokens[1], len(w.tokens)) for w in cut] == [
        (1, 100, 11),
        (1, 130, 11),
        (1, 160, 11),
    ]
    assert windows([5, 6, 7], size=512, limit=512, bos=None) == []


def test_of_a_text_the_second_half_of_each_window_is_scored():
    text = Conversation(0, 0, 0.0, tuple(range(10)), (Span("text", 10),))
    assert passages([text], "text")[0].positions == (5, 6, 7, 8, 9)
    assert passages([text], "assistant") == []
    chat = Conversation(1, 0, 0.0, (7, 8, 9), (Span("user", 1), Span("assistant", 2)))
    assert [each.positions for each in passages([chat, text], "assistant", "text")] == [
        (1, 2),
        (5, 6, 7, 8, 9),
    ]
