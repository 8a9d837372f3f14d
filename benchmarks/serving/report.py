"""What a run says: a markdown table with lists of failures and conditions, and JSON of every request."""

import platform
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.serving.alone import partings
from benchmarks.serving.catalogue import SCENARIOS, SPECULATION_OFF, Goal, Scenario, never_slower
from benchmarks.serving.compare import Comparison, Spread, compared
from benchmarks.serving.contest import Result, Settings
from benchmarks.serving.figures import FIGURES
from benchmarks.serving.load import Round

#: Figures whose ratio means something: not counts, and not shares.
WITH_RATIO = ("tokens/s", "s")
#: Of a request: what it said, and what is written rounded.
UNTOLD = ("text", "stamps")


@dataclass(frozen=True, slots=True)
class ModelReport:
    """The results of one model."""

    model: Path
    results: tuple[Result, ...]


def comparisons(result: Result) -> list[Comparison]:
    """The figures that a scenario shows, compared over its rounds."""
    scenario, goals = SCENARIOS[result.scenario], goals_of(result)
    ours, theirs = (
        [scenario.evaluate(played) for played in result.rounds[each.name]] for each in result.contestants
    )
    return [compared(figure, ours, theirs, goals) for figure in scenario.shows]


def goals_of(result: Result) -> list[Goal]:
    """What lq aims at with this model beside this server. Ratios are judged to the server that they are
    meant against: llama-server, or lq itself without speculation; to another they give no verdict."""
    scenario, (ours, theirs) = SCENARIOS[result.scenario], result.contestants
    own = [goal for goal in scenario.goals if goal.own]
    ratios = [goal for goal in scenario.goals if not goal.own and goal.is_of(result.model)]
    if theirs.program == "lq" and theirs.options == (*ours.options, *SPECULATION_OFF):
        return own + (ratios if scenario.rival else never_slower(scenario.shows))
    is_meant = theirs.program == "llama-server" and not scenario.rival
    return own + (ratios if is_meant else [])


def markdown(reports: Sequence[ModelReport], settings: Settings) -> str:
    """The whole report."""
    lines = [
        "# Serving under load",
        "",
        f"{machine()}; {settings.threads} threads, medians of {settings.rounds} alternating "
        f"round{'s' * (settings.rounds != 1)}{', quick' * settings.quick}; llama.cpp as in llama-cpp-python "
        f"{version('llama-cpp-python')} for both. Ratios: median of the paired rounds (quartiles).",
    ]
    for report in reports:
        size = report.model.stat().st_size / 1e6
        lines += ["", f"## {report.model.name} ({size:.0f} MB)"]
        for pair, results in _by_pair(report.results):
            lines += ["", *_table(pair, results)]
        lines += ["", *_conditions(report.results, settings), *_problems(report.results)]
    return "\n".join(lines) + "\n"


def document(reports: Sequence[ModelReport], settings: Settings) -> dict[str, Any]:
    """Everything, for JSON: figures and records of every round, without the texts that were written."""
    return {
        "machine": machine(),
        "llama_cpp_python": version("llama-cpp-python"),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "quick": settings.quick,
        "models": [
            {"model": report.model.name, "scenarios": [_record(result) for result in report.results]}
            for report in reports
        ],
    }


def machine() -> str:
    """The processor and its cores."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    named = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return f"{next(named, platform.processor() or platform.machine())}, {cores} cores"


def _record(result: Result) -> dict[str, Any]:
    scenario = SCENARIOS[result.scenario]
    return {
        "scenario": result.scenario,
        "problem": result.problem,
        "seconds": round(result.seconds, 1),
        "contestants": {each.name: [each.program, *each.options] for each in result.contestants},
        "memory_bytes": result.memory_bytes,
        "compared": [] if result.problem else comparisons(result),
        "rounds": {name: [_played(scenario, each) for each in all_] for name, all_ in result.rounds.items()},
    }


def _played(scenario: Scenario, played: Round) -> dict[str, Any]:
    record: dict[str, Any] = {"figures": scenario.evaluate(played), "requests": _requests(played)}
    if played.without:
        record["without"] = {"group": scenario.without, "requests": _requests(played.without)}
    if played.alone:
        record["partings"] = [asdict(each) for each in partings(played.outcomes, played.alone)]
        record["failed_alone"] = [each.failure for each in played.alone if each.failure]
    if played.footprint:
        record["footprint"] = asdict(played.footprint)
    return record


def _requests(played: Round) -> list[dict[str, Any]]:
    requests = []
    for each in played.outcomes:
        told = {name: getattr(each, name) for name in each.__dataclass_fields__ if name not in UNTOLD}
        requests.append(told | {"stamps": [round(stamp, 4) for stamp in each.stamps]})
    return requests


def _by_pair(results: Iterable[Result]) -> list[tuple[tuple[str, str], list[Result]]]:
    """Results of the same two contestants together: their names head a table's columns."""
    tables: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if not result.problem:
            ours, theirs = result.contestants
            tables.setdefault((ours.name, theirs.name), []).append(result)
    return list(tables.items())


def _table(pair: tuple[str, str], results: Sequence[Result]) -> list[str]:
    rows = [f"| scenario | figure | {pair[0]} | {pair[1]} | ratio | goal |", "|---|---|---:|---:|---:|---|"]
    for result in results:
        for number, row in enumerate(comparisons(result)):
            name = result.scenario if number == 0 else ""
            rows.append(f"| {name} | {_cells(row)} |")
    return rows


def _cells(row: Comparison) -> str:
    figure = FIGURES[row.figure]
    ratio = ""
    if row.ratio and figure.unit in WITH_RATIO:
        ratio = f"{row.ratio.middle:.2f} ({row.ratio.low:.2f}-{row.ratio.high:.2f})"
    verdict = {True: ", met", False: ", missed", None: ""}[row.met]
    unit = f" ({figure.unit})" if figure.unit else ""
    cells = [
        figure.label + unit,
        _number(row.ours, figure.digits),
        _number(row.theirs, figure.digits),
        ratio,
        f"{row.goal}{verdict}" if row.goal else "",
    ]
    return " | ".join(cells)


def _number(spread: Spread | None, digits: int) -> str:
    return "none" if spread is None else f"{spread.middle:.{digits}f}"


def _conditions(results: Iterable[Result], settings: Settings) -> list[str]:
    lines = []
    for result in results:
        scenario = SCENARIOS[result.scenario]
        shape, slots = settings.shape(scenario)
        cells = f"{shape.kv_cells or shape.n_ctx * slots:,} KV cells"
        parts = [f"{slots} slots, {shape.n_ctx:,} tokens a request, {cells}", f"{result.seconds:.0f} s"]
        if settings.quick and scenario.quick:
            parts.append("quick: " + ", ".join(f"{name} {value}" for name, value in scenario.quick.items()))
        given = [(each.name, " ".join(each.options)) for each in result.contestants]
        parts += [f"{name} with {words}" for name, words in given if words and not name.endswith(words)]
        parts += [f"{name} {size / 1e6:.0f} MB" for name, size in result.memory_bytes.items()]
        lines.append(f"- {result.scenario}: {scenario.title}; {'; '.join(parts)}")
    return lines


def _problems(results: Iterable[Result]) -> list[str]:
    """What did not run, and which failures there were."""
    lines = []
    for result in results:
        if result.problem:
            lines.append(f"- {result.scenario} was not run:\n\n```\n{result.problem}\n```\n")
        for name, rounds in result.rounds.items():
            kinds = failures(rounds)
            total = sum(len(played.outcomes) for played in rounds)
            told = "; ".join(f"{count} {kind}: {detail}" for (kind, detail), count in kinds.items())
            if kinds:
                lines.append(f"- {result.scenario}, {name}: {sum(kinds.values())} of {total} failed: {told}")
    return ["", "Failures:", "", *lines] if lines else []


def failures(rounds: Iterable[Round]) -> Mapping[tuple[str, str], int]:
    """Failed requests by kind; of each kind one detail is told, the first."""
    failed = [each for played in rounds for each in played.outcomes if each.failure]
    first: dict[str, str] = {}
    for each in failed:
        first.setdefault(str(each.failure), " ".join(each.detail.split())[:160])
    counts = Counter(str(each.failure) for each in failed)
    return {(kind, first[kind]): count for kind, count in counts.most_common()}
