"""`python -m benchmarks.quantizing.study STUDY RUN`: where a run's gain comes from, how good predictions are.

RUN is the folder of a finished `lq quantize --size A,B --eval-text FILE --keep-source`. `ablation`: for each
of its budgets llama.cpp's recipe nearest in size and our types, each rounded to nearest, tensor by tensor
under Hessians, and with layers in their order. `rank`: mixes at several sizes, good and bad ones, predicted
against measured.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.quantizing.__main__ import say
from benchmarks.quantizing.bench import Bench
from benchmarks.quantizing.stock import Measured, Yard
from quantize.figures import number, with_error
from quantize.measure import Backend
from quantize.mixes.allocate import Choice, Tensor, allocate

RECIPES = ("Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K")
RANKED = 20
SPREAD = 1.5  # of the logarithm of a factor on each cost: mixes that somebody who knows less would choose


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one study, print its table and write it."""
    studies: Mapping[str, Callable[[Bench], str]] = {"ablation": ablation, "rank": rank}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizing.study", description=__doc__)
    parser.add_argument("study", choices=studies)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished run with budgets")
    parser.add_argument("--out", type=Path, default=Path(".cache/bench-quantize"), help="tables and parts")
    parser.add_argument("--threads", type=int, help="CPU threads; physical cores")
    args = parser.parse_args(arguments)
    if not (args.run / "work" / "sensitivities.npz").is_file():
        parser.error(f"{args.run} holds no sensitivities; RUN is a run with --size and --keep-source")
    text = studies[args.study](Bench(Yard.open(args.run, args.out, Backend(args.threads), say)))
    (args.out / f"{args.study}.md").write_text(text, "utf-8")
    print(text)
    return 0


def ablation(bench: Bench) -> str:
    """A table: types and rounding, theirs and ours."""
    lines = ["| types | rounding | MB | mean KLD, chats | mean KLD, text |", "|---|---|---:|---:|---:|"]
    for path in sorted((bench.yard.run / "work").glob("mix-*.json")):
        label, types = path.stem.removeprefix("mix-"), json.loads(path.read_text("utf-8"))["types"]
        recipe = _nearest_recipe(bench, bench.source.layout(types).size_bytes)
        stock = bench.stock_types(recipe)
        for name, chosen in ((f"llama.cpp's {recipe}", stock), (f"ours, {label}", types)):
            for rounding in ("nearest", "best", "in order"):
                found = bench.measure(name, chosen, rounding)
                lines.append(_line((name, rounding), found))
    return "\n".join(lines) + "\n"


def _nearest_recipe(bench: Bench, size_bytes: int) -> str:
    def distance(kind: str) -> int:
        return abs(bench.source.layout(bench.stock_types(kind)).size_bytes - size_bytes)

    return min(RECIPES, key=distance)


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
