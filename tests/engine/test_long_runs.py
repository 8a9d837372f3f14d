"""Endless words, spaces, digits and signs are tokenized, however the vocabulary splits words."""

import subprocess
import sys
from pathlib import Path

import gguf
import pytest

from engine.llama import Model
from engine.runs import LONGEST_RUN, without_long_runs

ROOT = Path(__file__).parents[2]
RUN = 50_000
UNITS = ["a", ".", " ", "1", "\n", "가", "\u0915\u093f", "!\u0301", "a1", "!\x1c", "\u3000"]


def letters_of_bytes() -> list[str]:
    """GPT-2's way of writing the 256 bytes as letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="module")
def make_vocabulary(tmp_path_factory):
    """A function: the name of the splitting expression -> a GGUF that holds a vocabulary of bytes only."""

    def make(pre: str) -> Path:
        path = tmp_path_factory.mktemp("vocabulary") / f"{pre}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*letters_of_bytes(), "<s>", "</s>"])
        writer.add_token_types([1] * 256 + [3, 3])
        writer.add_token_merges(["a a"])
        writer.add_bos_token_id(256)
        writer.add_eos_token_id(257)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
        return path

    return make


SCRIPT = f"""
import sys
from pathlib import Path
from engine.llama import Model
with Model.open(Path(sys.argv[1]), vocab_only=True) as model:
    for unit in {UNITS!r}:
        text = "Before. " + unit * {RUN} + " after"
        tokens = model.tokenize(text)
        assert (tokens[0], tokens[-1]) == (model.bos_id, model.eos_id), unit
        assert not {{model.bos_id, model.eos_id}} & set(tokens[1:-1]), unit
        assert tokens[1:-1] == model.tokenize(text, add_special=False), unit
        assert model.detokenize(tokens[1:-1]) == text, unit
"""


@pytest.mark.parametrize("pre", ["deepseek-llm", "deepseek-v3", "tekken", "gpt-4o", "bloom", "default"])
def test_endless_runs_do_not_end_the_process(make_vocabulary, pre):
    command = [sys.executable, "-c", SCRIPT, str(make_vocabulary(pre))]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-2000:]


def test_special_tokens_beside_an_endless_run_are_parsed(make_vocabulary):
    with Model.open(make_vocabulary("tekken"), vocab_only=True) as model:
        tokens = model.tokenize("</s>" + "a" * RUN + "</s>", add_special=False, parse_special=True)
    assert (tokens[0], tokens[-1], tokens.count(257)) == (257, 257, 2)


@pytest.mark.parametrize("length", [*range(LONGEST_RUN - 6, LONGEST_RUN + 7), 3 * LONGEST_RUN - 1])
@pytest.mark.parametrize("sign", ["!", "<", "a"])
def test_a_special_token_at_either_end_of_a_run_stays_whole(make_vocabulary, sign, length):
    """`</s>` begins and ends with signs, which are of a run with those around it."""
    with Model.open(make_vocabulary("tekken"), vocab_only=True) as model:
        tokens = model.tokenize(f"</s>{sign * length}</s>", add_special=False, parse_special=True)
        assert (tokens[0], tokens[-1], tokens.count(257)) == (257, 257, 2)
        assert model.detokenize(tokens) == sign * length


@pytest.mark.parametrize("unit", [".", "가"])
def test_ten_megabytes_of_one_character_are_tokenized(make_vocabulary, unit):
    letters = unit.encode()
    count = 10_000_000 // len(letters)
    with Model.open(make_vocabulary("tekken"), vocab_only=True) as model:
        tokens = model.tokenize(unit * count, add_special=False)  # a token a byte
        assert [model.piece(token) for token in tokens[: len(letters)]] == [bytes([one]) for one in letters]
        assert tokens == tokens[: len(letters)] * count


def test_every_text_goes_the_way_that_cuts_runs():
    """`llama_tokenize` is called in `Model._tokenize` alone, and that by `Model.tokenize` alone."""
    sources = {
        path: path.read_text("utf-8")
        for folder in ("engine", "models", "quantize", "rag", "server", "lq")
        for path in (ROOT / folder).rglob("*.py")
    }
    engine = ROOT / "engine" / "llama.py"
    assert [path for path, text in sources.items() if "llama_tokenize" in text] == [engine]
    before, after = sources[engine].split("    def _tokenize(")
    assert "llama_tokenize" not in before
    body, _, rest = after.partition("    def ")
    assert "llama_tokenize(" in body
    assert "_tokenize(" not in rest
    callers = {path for path, text in sources.items() if "._tokenize(" in text}
    assert callers == {engine}
    assert before.rpartition("    def tokenize(")[2].count("self._tokenize(") == before.count(
        "self._tokenize("
    )


def test_ordinary_text_is_one_part():
    words = "word " * 5000 + "\n" * 100 + "가나다, " * 3000
    assert without_long_runs(words) == [words]
    assert without_long_runs("a1" * RUN) == ["a1" * RUN]
    assert without_long_runs("a" * LONGEST_RUN) == ["a" * LONGEST_RUN]


@pytest.mark.parametrize("unit", UNITS)
def test_parts_make_up_the_text_and_are_short(unit):
    text = f"One {unit * RUN} two {unit * RUN}"
    parts = without_long_runs(text, mixed=unit == "a1")
    assert "".join(parts) == text
    assert max(map(len, parts)) < 2 * LONGEST_RUN
