"""`python -m benchmarks.quantizing.study STUDY RUN`: where a run's gain comes from, how good predictions are.

RUN is the folder of a finished `lq quantize --size A,B --eval-text FILE --keep-source`. `ablation`: for each
of its budgets llama.cpp's recipe nearest in size and our types, each rounded to nearest, tensor by tensor
under Hessians, and with layers in their order. `calibration`: the recipe nearest to the run's largest budget,
and our types for it, rounded by the run's own text, by --text, and by random tokens, as many of each.
`rank`: mixes at several sizes, good and bad ones, predicted against measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.quantizing.__main__ import say
from benchmarks.quantizing.bench import Bench, Rounding
from benchmarks.quantizing.stock import Measured, Yard
from quantize.calibration.conversation import Conversation, Journal, Span, read
from quantize.calibration.importance import collect
from quantize.calibration.texts import cut_text
from quantize.figures import number, with_error
from quantize.measure import Backend
from quantize.mixes.allocate import Choice, Tensor, allocate
from quantize.network.network import EMBEDDING
from quantize.source import digest

RECIPES = ("Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "best", "in order")
RANKED = 20
SPREAD = 1.5  # of the logarithm of a factor on each cost: mixes that somebody who knows less would choose


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one study, print its table and write it."""
    studies: Mapping[str, Callable[[Bench, argparse.Namespace], str]] = {
        "ablation": lambda bench, _: ablation(bench),
        "calibration": lambda bench, args: calibration(bench, args.text),
        "rank": lambda bench, _: rank(bench),
    }
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizing.study", description=__doc__)
    parser.add_argument("study", choices=studies)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run with budgets")
    parser.add_argument("--out", type=Path, default=Path(".cache/bench-quantize"), help="tables and parts")
    parser.add_argument("--text", type=Path, help="plain text to calibrate on, for `calibration`")
    parser.add_argument("--tokens", type=int, help="about how many tokens of each text are scored; all")
    parser.add_argument("--threads", type=int, help="CPU threads; physical cores")
    args = parser.parse_args(arguments)
    if not (args.run / "work" / "sensitivities.npz").is_file():
        parser.error(f"{args.run} holds no sensitivities; RUN is a run with --size and --keep-source")
    if args.study == "calibration" and (args.text is None or not args.text.is_file()):
        parser.error(f"--text is {args.text}; give the plain text to calibrate on")
    if args.tokens is not None and args.tokens < 1:
        parser.error(f"--tokens is {args.tokens}; give 1 or more, or leave it out for all")
    yard = Yard.open(args.run, args.out, Backend(args.threads), say, args.tokens)
    text = studies[args.study](Bench(yard), args)
    (args.out / f"{args.study}{yard.suffix}.md").write_text(text, "utf-8")
    print(text)
    return 0


def ablation(bench: Bench) -> str:
    """A table: types and rounding, theirs and ours."""
    lines = ["| types | rounding | MB | mean KLD, chats | mean KLD, text |", "|---|---|---:|---:|---:|"]
    for label, types in _mixes_of(bench):
        recipe = _nearest_recipe(bench, bench.source.layout(types).size_bytes)
        stock = bench.stock_types(recipe)
        for name, chosen in ((f"llama.cpp's {recipe}", stock), (f"ours, {label}", types)):
            for rounding in ROUNDINGS:
                found = bench.measure(name, chosen, rounding)
                lines.append(_line((name, rounding), found))
    return "\n".join(lines) + "\n"


def _mixes_of(bench: Bench) -> list[tuple[str, dict[str, str]]]:
    """The run's budgets with the types chosen for them, smallest first."""
    found = {
        path.stem.removeprefix("mix-"): json.loads(path.read_text("utf-8"))["types"]
        for path in (bench.yard.run / "work").glob("mix-*.json")
    }
    return sorted(found.items(), key=lambda each: bench.source.layout(each[1]).size_bytes)


def _nearest_recipe(bench: Bench, size_bytes: int) -> str:
    def distance(kind: str) -> int:
        return abs(bench.source.layout(bench.stock_types(kind)).size_bytes - size_bytes)

    return min(RECIPES, key=distance)


def calibration(bench: Bench, text: Path) -> str:
    """A table: what files are worth by what they were calibrated on."""
    lines = [
        "| calibrated on | types | rounding | MB | mean KLD, chats | mean KLD, text |",
        "|---|---|---|---:|---:|---:|",
    ]
    label, types = _mixes_of(bench)[-1]
    recipe = _nearest_recipe(bench, bench.source.layout(types).size_bytes)
    own = read(bench.text)
    others = {text.name: _from_file(bench, text, own), "random tokens": _random(bench, own)}
    for name, by in {"its own text": bench, **others}.items():
        found = bench.yard.recipe(recipe, name, by.matrix)
        lines.append(_line((name, f"llama.cpp's {recipe}", "its own"), found))
        for rounding in ROUNDINGS:
            lines.append(_line((name, f"ours, {label}", rounding), by.measure(label, types, rounding)))
    return "\n".join(lines) + "\n"


def _from_file(bench: Bench, text: Path, own: Sequence[Conversation]) -> Bench:
    """Calibrated on as many tokens of a text file as the run's own text has."""

    def write(out: Path) -> None:
        n_tokens = sum(len(each.tokens) for each in own)
        cut_text(bench.yard.source, text, out, n_tokens=n_tokens, key="", backend=bench.yard.backend)

    return _calibrated(bench, f"text-{digest(text)[:12]}", write)


def _random(bench: Bench, own: Sequence[Conversation]) -> Bench:
    """Calibrated on as many sequences as the run's own text has, each as long, of random tokens."""
    n_vocab = next(tensor.shape[1] for tensor in bench.source.tensors if tensor.name == EMBEDDING)
    draw = np.random.default_rng(0)

    def write(out: Path) -> None:
        journal = Journal.open(out, key="")
        for each in own:
            tokens = tuple(draw.integers(n_vocab, size=len(each.tokens)).tolist())
            journal.add(Conversation(each.number, 0, 0.0, tokens, (Span("text", len(tokens)),)))

    return _calibrated(bench, "random", write)


def _calibrated(bench: Bench, name: str, write: Callable[[Path], None]) -> Bench:
    """A bench of other texts and the matrix collected on them, made where they are not there yet."""
    found = Bench(bench.yard, bench.yard.out / name)
    if not found.matrix.exists():
        found.folder.mkdir(exist_ok=True)
        found.text.unlink(missing_ok=True)  # begun by a run that was stopped
        write(found.text)
        bench.yard.say(f"collecting importance on {name}")
        texts, threads = [each.tokens for each in read(found.text)], bench.yard.backend.n_threads
        collect(bench.yard.source, texts, dataset=name, n_threads=threads).write(found.matrix)
    return found


def rank(bench: Bench) -> str:
    """A table of predicted and measured divergences, and how well their ranks agree."""
    lines = ["| mix | MB | predicted | mean KLD, chats | mean KLD, text |", "|---|---:|---:|---:|---:|"]
    predicted, chats, text = [], [], []
    for name, types in _mixes(bench):
        found = bench.measure(name, types, "nearest")
        predicted.append(bench.predicted(types))
        chats.append(found.chats.kl.mean if found.chats else np.nan)
        text.append(found.text.kl.mean if found.text else np.nan)
        cells = (name, f"{found.size_bytes / 1e6:.1f}", number(predicted[-1]), *_divergences(found))
        lines.append(f"| {' | '.join(cells)} |")
    told = ", ".join(
        f"{what} {_spearman(predicted, measured):.3f}"
        for what, measured in (("chats", chats), ("text", text))
        if not np.isnan(measured).any()
    )
    return "\n".join(lines) + f"\n\nRank correlation (Spearman) of predicted and measured: {told}\n"


def _mixes(bench: Bench) -> list[tuple[str, dict[str, str]]]:
    """At a quarter of RANKED sizes the best mix and three for costs that are wrong by a random factor."""
    draw, costs, found = np.random.default_rng(0), bench.sensitivities.shrunk(), []
    least, most = (sum(pick(sizes.values()) for sizes in bench.choices.values()) for pick in (min, max))
    for share in np.linspace(0.1, 0.7, RANKED // 4):
        budget = int(least + share * (most - least))
        for number_ in range(4):
            factors = np.exp(draw.normal(0, SPREAD if number_ else 0, costs.shape))
            mix = allocate(_tensors(bench, costs * factors), budget).best
            found.append(
                (f"{budget / 1e6:.0f} MB, {'best' if not number_ else f'guess {number_}'}", mix.types)
            )
    return found


def _tensors(bench: Bench, costs: np.ndarray) -> list[Tensor]:
    found = bench.sensitivities
    return [
        Tensor(
            name,
            tuple(
                Choice(kind, size, float(costs[found.names.index(name), found.types.index(kind)]), 0.0)
                for kind, size in sizes.items()
            ),
        )
        for name, sizes in bench.choices.items()
    ]


def _spearman(left: Sequence[float], right: Sequence[float]) -> float:
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (left, right)]
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _line(names: Sequence[str], found: Measured) -> str:
    return f"| {' | '.join((*names, f'{found.size_bytes / 1e6:.1f}', *_divergences(found)))} |"


def _divergences(found: Measured) -> tuple[str, str]:
    chats, text = (with_error(d.kl) if d else "-" for d in (found.chats, found.text))
    return chats, text


if __name__ == "__main__":
    sys.exit(main())
