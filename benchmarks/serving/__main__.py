"""`make bench-serve`: lq against llama-server under the loads of benchmarks/serving/scenarios.py.

Builds llama-server from the same sources as lq's own llama.cpp on first use (benchmarks/peer.py), runs both
beside each other on loopback, alternates between them, and writes a table, plots and JSON. Everything takes
about two hours with the default model on 2 cores, --quick about half an hour.
"""

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil

from benchmarks.serving.catalogue import SCENARIOS, Scenario
from benchmarks.serving.contest import Contestant, Result, Settings, contest, sized_texts
from benchmarks.serving.model_files import NoRoom, model_file, require_room
from benchmarks.serving.plots import charts
from benchmarks.serving.report import ModelReport, document, markdown
from quantize.plots import write_figure

DEFAULT_MODEL = "smollm2-135m-instruct:Q4_0"

EXAMPLES = """

examples, as ARGS of `make bench-serve`:
  speculation on against off, in every scenario:
    --peer lq --peer-option "--speculation off"
  what others' requests do to one's own, and what weights give:
    --scenarios abandoned,flood,weights
  the same texts without room for all, and memory over 2,000 requests:
    --scenarios oversubscribed,memory
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 when a scenario could not be run, 130 after Ctrl-C."""
    args = parsed(arguments)
    # As Ctrl-C does: unwind, so that the servers started here are stopped.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    logs = args.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        threads=args.threads, slots=args.slots, rounds=args.rounds or (1 if args.quick else 5),
        quick=args.quick, timeout_s=args.timeout, logs=logs, n_ctx=args.n_ctx,
    )  # fmt: skip
    reports: list[ModelReport] = []
    try:
        for name in args.model or [DEFAULT_MODEL]:
            reports += measured(name, args, settings, before=reports)
    except KeyboardInterrupt:
        say("stopped; what was measured before is in the report")
        return 130
    return int(any(result.problem for report in reports for result in report.results))


def measured(
    name: str, args: argparse.Namespace, settings: Settings, *, before: Sequence[ModelReport]
) -> list[ModelReport]:
    """The report of one model; files are written after every scenario, so that a stopped run leaves them."""
    model = model_file(name)
    texts = sized_texts(model, settings.logs)
    results: list[Result] = []
    report = ModelReport(model, ())
    for each in args.scenarios:
        scenario = SCENARIOS[each]
        say(f"{model.stem}, {each}: {scenario.title}")
        pair = contestants(args, scenario)
        try:
            warning = require_room(model, *settings.shape(scenario))
        except NoRoom as error:
            results.append(Result(each, pair, problem=str(error)))
        else:
            if warning and pair[1].program == "llama-server" and not pair[1].options:
                say(f"  {warning}")
            results.append(contest(each, scenario, pair, model, texts, settings=settings, say=say))
        say(f"  {results[-1].problem or f'{results[-1].seconds:.0f} s with starting both servers'}")
        report = ModelReport(model, tuple(results))
        write([*before, report], args, settings)
    return [report]


def contestants(args: argparse.Namespace, scenario: Scenario) -> tuple[Contestant, Contestant]:
    """lq, and whom it is compared with: --peer, else what the scenario says, else llama-server."""
    ours, given = options(args.lq_option), options(args.peer_option)
    lq = Contestant("lq", "lq", ours)
    if scenario.rival is not None and args.peer is None:
        return lq, Contestant(" ".join(["lq", *scenario.rival]), "lq", (*ours, *scenario.rival))
    if args.peer == "lq":
        return lq, Contestant(" ".join(["lq", *given]) if given else "lq again", "lq", (*ours, *given))
    return lq, Contestant("llama-server", "llama-server", given)


def write(reports: Sequence[ModelReport], args: argparse.Namespace, settings: Settings) -> None:
    """The table, the JSON and the plots of what is there so far."""
    (args.out / "serving.md").write_text(markdown(reports, settings), "utf-8")
    target = args.json or args.out / "serving.json"
    target.write_text(json.dumps(msgspec.to_builtins(document(reports, settings)), indent=1), "utf-8")
    for name, figure in charts(reports[-1]).items():
        write_figure(figure, args.out, f"{reports[-1].model.stem}-{name}")


def options(given: Sequence[str]) -> tuple[str, ...]:
    """Words of --lq-option or --peer-option, each of which may hold several as a shell splits them."""
    return tuple(word for each in given for word in shlex.split(each))


def say(text: str) -> None:
    """A progress line, with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; what cannot be carried out is refused here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description=__doc__,
        epilog="scenarios:\n"
        + "\n".join(f"  {name:15} {each.title}" for name, each in SCENARIOS.items())
        + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model",
        action="append",
        help=f"NAME, NAME:TYPE (requantized) or a path; repeatable; {DEFAULT_MODEL}",
    )
    add("--scenarios", type=scenario_names, default=list(SCENARIOS), help="by commas; all of them")
    add("--rounds", type=positive, help="rounds of each server; 5, with --quick 1")
    add("--quick", action="store_true", help="one round, and fewer clients where that changes little")
    add("--out", type=Path, default=Path(".cache/bench-serve"), help="table, plots, logs; .cache/bench-serve")
    add("--json", type=Path, help="where the JSON goes; serving.json in --out")
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    add("--threads", type=positive, default=cores, help="of each server; physical cores")
    add("--slots", type=positive, default=8, help="where the scenario does not say; 8")
    add("--n-ctx", type=positive, help="tokens of one request; what the scenario needs")
    add(
        "--timeout",
        type=positive,
        default=900,
        help="seconds that a request may take before it has failed; 900",
    )
    add(
        "--peer", choices=("llama-server", "lq"), help="whom to compare with; llama-server, but in `grounded`"
    )
    add("--lq-option", action="append", default=[], metavar="OPTION", help="of `lq serve`; repeatable")
    add("--peer-option", action="append", default=[], metavar="OPTION", help="of the other; repeatable")
    args = parser.parse_args(arguments)
    needs = {name: SCENARIOS[name].shape.n_ctx for name in args.scenarios}
    small = [name for name, needed in needs.items() if args.n_ctx and args.n_ctx < needed]
    if small:
        told = ", ".join(f"{name} needs {needs[name]}" for name in small)
        parser.error(f"--n-ctx {args.n_ctx} is too small: {told}; choose --scenarios that fit")
    return args


def scenario_names(text: str) -> list[str]:
    """Names by commas."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in SCENARIOS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no scenario {unknown[0]!r}; there are {', '.join(SCENARIOS)}")
    return names


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
