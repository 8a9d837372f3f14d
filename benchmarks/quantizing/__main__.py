"""`make bench-quantize`: files of `lq quantize` against llama.cpp's recipes at equal bytes.

RUN is the folder of an `lq quantize --keep-source --eval-text FILE` run; its held-out chats and text judge.
The recipes are made with the run's own importance matrix and with every --matrix, and the better of them
counts at each size, on the hull of all. Two minutes a recipe for a model of 135M on 2 cores.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quantizing.hull import Point, at, lower_hull
from benchmarks.quantizing.stock import Measured, Yard
from quantize.figures import with_error
from quantize.gguf_files.types import parse_types
from quantize.measure import Backend

RECIPES = (
    "Q8_0,Q6_K,Q5_K_M,Q5_K_S,Q5_1,Q5_0,Q4_K_M,Q4_K_S,Q4_1,Q4_0,IQ4_NL,IQ4_XS,"
    "Q3_K_L,Q3_K_M,Q3_K_S,IQ3_M,IQ3_S,IQ3_XXS,Q2_K"
)
TEXTS = {"chats": "held-out chats", "text": "public text"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print the tables, and write them."""
    args = parsed(arguments)
    yard = Yard.open(args.run, args.out, Backend(args.threads), say)
    matrices = {"self": args.run / "imatrix.gguf", **dict(args.matrix)}
    stock = [
        yard.recipe(kind, name, path) for kind in parse_types(args.types) for name, path in matrices.items()
    ]
    ours = [yard.file(path) for path in args.files]
    text = tables(stock, ours)
    (args.out / "quantizing.md").write_text(text, "utf-8")
    print(text)
    return 0


def tables(stock: Sequence[Measured], ours: Sequence[Measured]) -> str:
    """The recipes, and each of our files beside the recipes' hull at its bytes."""
    lines = ["| file | MB | mean KLD, chats | mean KLD, text | tok/s write |", "|---|---:|---:|---:|---:|"]
    lines += [_line(each) for each in sorted([*stock, *ours], key=lambda each: each.size_bytes)]
    if not ours:
        return "\n".join(lines) + "\n"
    lines += [
        "",
        "| file | MB | text | mean KLD | recipes at these bytes | ratio |",
        "|---|---:|---|---:|---:|---:|",
    ]
    for key, label in TEXTS.items():
        corners = lower_hull([Point(e.size_bytes, d.kl.mean) for e in stock if (d := getattr(e, key))])
        for each in ours:
            if (found := getattr(each, key)) is None:
                continue
            there = at(corners, each.size_bytes)
            beside = (
                ("none so small", "") if there is None else (f"{there:.4f}", f"{found.kl.mean / there:.3f}")
            )
            cells = (each.name, f"{each.size_bytes / 1e6:.1f}", label, with_error(found.kl), *beside)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _line(each: Measured) -> str:
    values = [with_error(d.kl) if d else "-" for d in (each.chats, each.text)]
    return f"| {each.name} | {each.size_bytes / 1e6:.1f} | {' | '.join(values)} | {each.decode:.0f} |"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what cannot be carried out is refused here."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizing", description=__doc__)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a finished `lq quantize --keep-source`")
    add("files", type=Path, nargs="*", metavar="FILE", help="GGUFs to compare")
    add("--types", default=RECIPES, help="recipes, by commas")
    add("--matrix", type=_matrix, action="append", default=[], metavar="NAME=FILE", help="another imatrix")
    add("--out", type=Path, default=Path(".cache/bench-quantize"), help="tables; .cache/bench-quantize")
    add("--threads", type=int, help="CPU threads; physical cores")
    args = parser.parse_args(arguments)
    for path in (args.run / "work" / "source.gguf", args.run / "imatrix.gguf", *args.files):
        if not path.is_file():
            parser.error(f"{path} is not there; RUN is the folder of `lq quantize --keep-source`")
    return args


def _matrix(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=FILE of an importance matrix that is there")
    return name, Path(path)


def say(text: str) -> None:
    """A progress line, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
