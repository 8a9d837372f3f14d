"""The `lq` command: one line per subcommand, exit codes, and how an error reaches the terminal.

Heavy imports live inside the commands, so that `lq --help` answers at once.
Exit codes: 0 done, 1 an expected error (one line on stderr), 2 wrong usage, 130 interrupted.
"""

import importlib
import os
import sys

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


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        build()()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if not is_expected(error) or os.environ.get("LQ_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(1) from None
