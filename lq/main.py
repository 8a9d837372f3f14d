"""The `lq` command: one line per subcommand, exit codes, and how an error reaches the terminal.

Heavy imports live inside the commands, so that `lq --help` answers at once.
Exit codes: 0 done, 1 an expected error (one line on stderr), 2 wrong usage, 130 interrupted.
"""

import importlib
import os
import re
import sys
from collections.abc import Sequence

import typer

#: An exception class defined on one of our floors is an expected error with a message for the user;
#: anything else is a defect and keeps its traceback.
FLOORS = frozenset({"engine", "models", "quantize", "rag", "prompts", "server", "lq"})

#: Modules whose `register(app)` adds their commands, in the order `--help` shows them.
COMMANDS = ("store", "quantize", "tune", "index", "ask", "serve", "demo", "bench")


def build() -> typer.Typer:
    """Assemble the command tree; imports only the thin command modules."""
    app = typer.Typer(
        name="lq",
        help="Quantize a Hugging Face model, index your documents, serve both behind the OpenAI API.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )
    for name in COMMANDS:
        importlib.import_module(f"lq.commands.{name}").register(app)
    return app


def is_expected(error: BaseException) -> bool:
    """Whether an error explains itself to the user: ours, or the operating system's about a file."""
    if isinstance(error, OSError):
        return error.errno is not None
    return type(error).__module__.partition(".")[0] in FLOORS


class EmptyArgument(Exception):
    """An argument without a character: mostly a variable of a script that is not set."""

    def __init__(self, number: int, before: str | None) -> None:
        after = f", after {before}," if before else ""
        super().__init__(f"argument {number}{after} is empty; give it a value or leave it out")


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise EmptyArgument: "" would mean the folder one is in, or that an option was not given."""
    for number, argument in enumerate(arguments):
        if not argument:
            raise EmptyArgument(number + 1, arguments[number - 1] if number else None)
        if re.fullmatch("--[a-z-]+=", argument):
            raise EmptyArgument(number + 1, argument)


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        check_arguments(sys.argv[1:])
        build()()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not is_expected(error) or os.environ.get("LQ_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
