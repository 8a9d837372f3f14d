"""The arithmetic of the serving benchmark: figures of a round, medians and paired ratios over rounds."""

from benchmarks.serving.catalogue import SCENARIOS, Goal
from benchmarks.serving.client import Outcome
from benchmarks.serving.compare import Spread, compared
from benchmarks.serving.contest import Contestant, Program, Result
from benchmarks.serving.figures import everyday, gaps, percentile
from benchmarks.serving.load import Round, gauge
from benchmarks.serving.report import comparisons, failures, goals_of
from tests.benchmarks.made_up import answered


def failed(kind, *, ended_s: float, detail: str = "") -> Outcome:
    return Outcome("clients", 1, 0, ended_s=ended_s, failure=kind, detail=detail)


def test_throughput_counts_answered_tokens_over_all_time_failures_included():
    figures = everyday(Round([answered(1.0, 2.0, tokens=20), failed("http", ended_s=4.0)]))
    assert figures["tokens_per_s"] == 5.0
    assert figures["failed"] == 1
    assert figures["requests"] == 2


def test_a_round_of_failures_has_no_throughput_and_no_first_token():
    figures = everyday(Round([failed("refused", ended_s=0.1)]))
    assert figures["tokens_per_s"] is None
    assert figures["ttft_p95_s"] is None
    assert figures["gap_s"] is None


def test_the_rate_of_a_stream_leaves_out_its_first_token():
    figures = everyday(Round([answered(5.0, 5.5, 6.0, tokens=11)]))
    assert figures["stream_tokens_per_s"] == 10.0


def test_an_answer_in_one_chunk_has_no_rate():
    assert everyday(Round([answered(1.0, tokens=8)]))["stream_tokens_per_s"] is None


def test_percentiles_are_values_that_were_measured():
    values = [float(n) for n in range(20, 0, -1)]
    assert percentile(values, 0.95) == 19.0
    assert percentile(values, 0.5) == 10.0
    assert percentile([7.0], 0.95) == 7.0
    assert percentile([], 0.5) is None


def test_gaps_count_within_a_window_when_they_overlap_it():
    stream = answered(1.0, 2.0, 5.0, 5.5)
    assert gaps(stream) == [1.0, 3.0, 0.5]
    assert gaps(stream, since_s=2.5, until_s=4.0) == [3.0]


def test_silence_before_a_stream_is_left_is_a_gap():
    stream = answered(1.0, 2.0)
    stream.left, stream.ended_s = True, 9.0
    assert gaps(stream) == [1.0, 7.0]


def test_quartiles_of_one_value_are_that_value():
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([]) is None
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(2.0, 3.0, 4.0)


def test_the_ratio_is_the_median_of_paired_rounds():
    ours = [{"tokens_per_s": rate} for rate in (10.0, 40.0, 90.0)]
    theirs = [{"tokens_per_s": rate} for rate in (10.0, 20.0, 30.0)]
    row = compared("tokens_per_s", ours, theirs, [Goal("tokens_per_s", at_least=2.0)])
    assert row.ratio is not None
    assert row.ratio.middle == 2.0
    assert row.ours is not None
    assert row.ours.middle == 40.0
    assert row.met is True


def test_a_round_without_a_value_makes_no_pair_and_no_verdict():
    row = compared(
        "tokens_per_s",
        [{"tokens_per_s": 3.0}],
        [{"tokens_per_s": None}],
        [Goal("tokens_per_s", at_least=1.0)],
    )
    assert row.ratio is None
    assert row.met is None
    assert row.theirs is None


def test_failures_give_their_worst_round_and_not_their_median():
    row = compared(
        "failed",
        [{"failed": n} for n in (0.0, 3.0, 0.0)],
        [{"failed": 0.0}] * 3,
        [Goal("failed", at_most=0, own=True)],
    )
    assert row.ours is not None
    assert row.ours.middle == 3.0
    assert row.met is False


def test_goals_tell_what_they_are_of():
    assert str(Goal("tokens_per_s", at_least=2.5)) == "≥ 2.5×"
    assert str(Goal("gap_s", at_most=0.3, own=True)) == "≤ 0.3 s"
    assert str(Goal("failed", at_most=0, own=True)) == "≤ 0"


def test_a_scenario_is_compared_in_every_figure_that_it_shows():
    pair = (Contestant("lq", "lq"), Contestant("llama-server", "llama-server"))
    rounds = {each.name: [Round([answered(1.0, 2.0)])] for each in pair}
    rows = comparisons(Result("clients-4", pair, rounds))
    assert [row.figure for row in rows] == list(SCENARIOS["clients-4"].shows)
    assert rows[0].met is False  # 1.0 is less than 1.05


def test_goals_against_llama_server_give_no_verdict_on_another_lq():
    pair = (Contestant("lq", "lq"), Contestant("lq again", "lq"))
    long = answered(4.0, 4.1, sent_s=2.0, group="long")
    rounds = {each.name: [Round([answered(0.5, 1.9, 2.5, 4.2, group="streams"), long])] for each in pair}
    verdicts = {row.figure: row.met for row in comparisons(Result("long-1200", pair, rounds))}
    assert verdicts["long_ttft_s"] is None
    assert verdicts["gap_s"] is False  # lq's own value is judged whoever stands beside it


def goals(scenario: str, *options: str, program: Program = "lq", model: str = "m.gguf") -> dict[str, str]:
    """What lq aims at beside another that has these options more."""
    pair = (
        Contestant("lq", "lq", ("--threads", "2")),
        Contestant("other", program, ("--threads", "2", *options)),
    )
    goals = goals_of(Result(scenario, pair, model=model))
    return {goal.figure: str(goal) for goal in reversed(goals)}


def test_beside_itself_without_speculation_lq_aims_at_never_being_slower():
    for scenario in SCENARIOS:
        found = goals(scenario, "--speculation", "off")
        speeds = {figure: text for figure, text in found.items() if text in ("≥ 0.98×", "≤ 1.02×")}
        assert len(speeds) == (scenario != "memory"), scenario
    assert goals("clients-8", "--speculation", "off") == {"tokens_per_s": "≥ 0.98×"}
    assert goals("long-1200", "--speculation", "off")["long_ttft_s"] == "≤ 1.02×"


def test_a_model_that_quotes_aims_at_more_in_quotations():
    assert goals("grounded", "--speculation", "off")["stream_tokens_per_s"] == "≥ 0.98×"
    large = goals("grounded", "--speculation", "off", model="Qwen2.5-Coder-1.5B-Q4_0.gguf")
    assert large["stream_tokens_per_s"] == "≥ 1.2×"


def test_grounded_gives_no_verdict_beside_llama_server_nor_beside_an_equal_lq():
    assert goals("grounded", program="llama-server") == {}
    assert goals("grounded") == {}


def test_failures_are_counted_by_kind_with_their_first_detail():
    outcomes = [
        failed("http", ended_s=1, detail="500:\n full"),
        failed("http", ended_s=1),
        failed("cut", ended_s=1),
    ]
    assert failures([Round(outcomes)]) == {("http", "500: full"): 2, ("cut", ""): 1}


def test_a_gauge_is_summed_over_its_labels():
    text = b'# HELP lq_engine_running x\nlq_engine_running{model="a"} 3.0\nlq_engine_running{model="b"} 1.0\n'
    assert gauge(text, "lq_engine_running") == 4.0
    assert gauge(b"llamacpp:requests_processing 2\n", "llamacpp:requests_processing") == 2.0
    assert gauge(b"lq_engine_running_more 2\n", "lq_engine_running") is None
