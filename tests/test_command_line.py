"""The command line as a script and as a person meet it: help, exit codes, one-line errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lq.main import COMMANDS, is_expected

LQ = Path(sys.executable).with_name("lq")
NAMES = ("pull", "list", "show", "rm", "quantize", "tune", "index", "search", "ask", "serve", "demo", "bench")
HEAVY = (
    "torch",
    "llama_cpp",
    "litestar",
    "faiss",
    "sentence_transformers",
    "transformers",
    "matplotlib",
    "numpy",
)


def run(*arguments: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = os.environ | {"LQ_HOME": str(home), "COLUMNS": "100"} | environment
    return subprocess.run(
        [LQ, *arguments], capture_output=True, text=True, env=settings, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("rm", ""), "argument 2, after rm,"), (("list", "--json="), "argument 2, after --json=,")],
)
def test_an_empty_argument_is_refused_by_its_place(tmp_path, arguments, named):
    result = run(*arguments, home=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == f"error: {named} is empty; give it a value or leave it out\n"


def test_help_lists_every_command(tmp_path):
    result = run("--help", home=tmp_path)
    assert result.returncode == 0
    for name in NAMES:
        assert f" {name} " in result.stdout


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself_without_heavy_imports(name, tmp_path):
    code = (
        "import sys; from lq.main import build; sys.argv = ['lq', sys.argv[1], '--help']\n"
        "try: build()()\n"
        "except SystemExit as end:\n"
        f"    loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    print(end.code, loaded, file=sys.stderr)"
    )
    settings = os.environ | {"LQ_HOME": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, env=settings, check=True
    )
    assert result.stderr.splitlines()[-1] == "0 []"
    assert "Usage:" in result.stdout


def test_help_has_no_escape_codes_when_piped(tmp_path):
    assert "\x1b" not in run("quantize", "--help", home=tmp_path).stdout


def test_wrong_usage_exits_2(tmp_path):
    for arguments in (["pull"], ["serve", "--port", "many"], ["nonsense"], ["list", "--nonsense"]):
        result = run(*arguments, home=tmp_path)
        assert result.returncode == 2, arguments
        assert result.stdout == ""


def test_an_expected_error_is_one_line_on_stderr_and_exits_1(tmp_path):
    result = run("show", "no-such-model", home=tmp_path)
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: no model named 'no-such-model'")


def test_an_unknown_collection_names_the_command_that_makes_one(tmp_path):
    result = run("search", "manuals", "what?", home=tmp_path)
    assert result.returncode == 1
    assert "lq index manuals" in result.stderr


def test_json_output_is_one_document(tmp_path):
    result = run("list", "--json", home=tmp_path)
    assert result.returncode == 0
    assert json.loads(result.stdout)["models"] == []


def test_a_home_that_cannot_be_written_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    result = run("pull", str(blocker), home=blocker)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1


def test_errors_of_our_floors_are_expected_and_others_are_defects():
    from models.errors import ModelsError

    assert is_expected(ModelsError("told"))
    assert is_expected(FileNotFoundError(2, "No such file or directory"))
    assert not is_expected(ValueError("a defect"))
    assert not is_expected(OSError("made by hand, without errno"))


def test_every_command_module_is_registered():
    files = {path.stem for path in (Path(__file__).parents[1] / "lq" / "commands").glob("[a-z]*.py")}
    assert files == set(COMMANDS)
