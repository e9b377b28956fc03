"""What `lopt-hf bench pipeline` prints: a row for each method, the first ranks' memory, and what a gain is made of."""

import json
import statistics
from dataclasses import asdict, dataclass

from lopt_hf.bench.pipeline.parts import Cut
from lopt_hf.bench.pipeline.settings import DELAYED, METHODS, PPLL, SCHEDULES, TWO_STAGES_PER_RANK, BenchSettings
from lopt_hf.common.tables import describe_run, markdown_table, mega, ratio_text

__all__ = ["PipelineBenchReport", "PipelineResult", "to_json", "to_markdown"]

LEAST_CORE_SHARE = 0.9  # ours: what is lost beyond that is as large as the differences of interest
NAMES = {name: METHODS[name].removesuffix(", end-to-end") for name in (*PPLL, *SCHEDULES, "e2e")}
ONE_PROCESS = ("lopt", "local")  # of language models and of image classifiers
# What is divided by what, and what that says.
COMPARISONS = (
    *((name, "e2e", "the smaller graph: local learning against end-to-end, one process each") for name in ONE_PROCESS),
    *(("ppll", name, "the schedule: PPLL against the same learning in one process") for name in ONE_PROCESS),
    *(("ppll", method, f"both: PPLL against {NAMES[method]}") for method in ("1f1b", "gpipe", *TWO_STAGES_PER_RANK)),
    ("ppll_delayed", "ppll", "the gradient that comes late: what its forward costs that runs again"),
    ("ppll_delayed_graph", "ppll", "the gradient that comes late, graph kept"),
    *(
        (ours, method, f"{NAMES[ours].replace(', ', ' with a ', 1)} against {NAMES[method]}")
        for ours in DELAYED
        for method in ("e2e", "1f1b", "gpipe", *TWO_STAGES_PER_RANK)
    ),
    *(
        (method, "e2e", f"{NAMES[method]} against the same learning in one process")
        for method in ("1f1b", "gpipe", *TWO_STAGES_PER_RANK)
    ),
)


@dataclass(frozen=True)
class PipelineResult:
    """Cost of one method.

    Attributes:
        method: Name of the row.
        tokens_per_second: Tokens of a step, of image classifiers images, over the median of `step_seconds`.
        speedup: The same relative to the local learning in one process (`lopt`, `local`) in this run, if it has that.
        step_seconds: Every timed step of all rounds: from the end of the step before to its own, both when the last
            stage to end it did.
        step_seconds_iqr: Their interquartile range.
        tokens_per_second_quartiles: Between these are the middle half of the steps.
        waiting: For each stage the share of the timed steps in which it waited for another, mean over the rounds;
            empty in one process.
        cpu_seconds: For each stage the CPU time per timed step, mean over the rounds.
        core_share: The least CPU time that a process had per second that it did not wait, in any round. Clearly below
            1, other programs took the rest, and the times are no measure of the method.
        saved_bytes: For each stage the peak bytes that autograd keeps for backward in a step, see `SavedBytes`, what
            may wait in the channels between stages and for a delayed gradient, and the weights that are
            expected.
        queued_bytes: All that but autograd's, for each stage.
        peak_resident_bytes: For each stage the peak resident memory of its process.
        loss: Task loss in nats per token or image of the last timed step. The same for methods that compute the same:
            PPLL and local learning; torch's schedules and `e2e`, but for the order of their sums.
        load: The machine's load average when each round of the method began.
    """

    method: str
    tokens_per_second: float
    speedup: float | None
    step_seconds: list[float]
    step_seconds_iqr: float
    tokens_per_second_quartiles: tuple[float, float]
    waiting: list[float]
    cpu_seconds: list[float]
    core_share: float
    saved_bytes: list[int]
    queued_bytes: list[int]
    peak_resident_bytes: list[int]
    loss: float
    load: list[float]


@dataclass(frozen=True)
class PipelineBenchReport:
    """The results of a run by method, and the cut that its pipelines have.

    Attributes:
        dtype: Type of the arithmetic, `"float32"` or `"bfloat16"`.
        cut: Where the pipelines cut the model.
        results: The results by the methods' keys.
        unit: What is counted per second.
    """

    dtype: str
    cut: Cut
    results: dict[str, PipelineResult]
    unit: str = "tokens"


def to_markdown(report: PipelineBenchReport) -> str:
    """The results as a table, the first ranks' memory, and what the gain is made of; MB is 10^6 bytes."""
    header = ["method", f"{report.unit}/s", "middle half", "x one process", "step (s)", "IQR (s)"]
    header += ["CPU per step (s), by stage", "waiting, by stage", "saved for backward, by stage (MB)"]
    header += ["peak RSS, by stage (MB)", "loss"]
    rows = []
    for result in report.results.values():
        low, high = result.tokens_per_second_quartiles
        cells = [result.method, f"{result.tokens_per_second:,.0f}", f"{low:,.0f} to {high:,.0f}"]
        cells += [ratio_text(result.speedup)]
        cells += [f"{statistics.median(result.step_seconds):.2f}", f"{result.step_seconds_iqr:.2f}"]
        cells += [", ".join(f"{seconds:.2f}" for seconds in result.cpu_seconds)]
        cells += [", ".join(f"{share:.1%}" for share in result.waiting) or "-"]
        cells += [", ".join(map(mega, values)) for values in (result.saved_bytes, result.peak_resident_bytes)]
        rows.append([*cells, f"{result.loss:.3f}"])
    notes = "\n".join([*_comparisons(report.results, report.unit), *_earlier_cut(report), *_warnings(report.results)])
    return "\n\n".join(part for part in (markdown_table(header, rows), _memory_table(report.results), notes) if part)


def _memory_table(results: dict[str, PipelineResult]) -> str:
    """What PPLL's first stage saves for backward, as a share of the first rank's of each schedule of torch's."""
    ours = [method for method in PPLL if method in results]
    schedules = [method for method in SCHEDULES if method in results]
    if not ours or not schedules:
        return ""
    header = ["saved for backward on the first rank, as a share of", *(NAMES[method] for method in schedules)]
    saved = {method: result.saved_bytes[0] for method, result in results.items()}
    return markdown_table(
        header,
        [[NAMES[method], *(ratio_text(saved[method] / saved[other]) for other in schedules)] for method in ours],
    )


def _comparisons(results: dict[str, PipelineResult], unit: str) -> list[str]:
    """What is faster than what by how much."""
    lines = []
    for method, other, meaning in COMPARISONS:
        if method in results and other in results:
            speed = results[method].tokens_per_second / results[other].tokens_per_second
            lines.append(f"- x {speed:.2f} {unit}/s from {meaning}")
    return lines


def _earlier_cut(report: PipelineBenchReport) -> list[str]:
    """Where the pipeline is cut that is not cut as the others are."""
    if "ppll_delayed" not in report.results or report.cut.rerun_at == report.cut.split_at:
        return []
    cuts = [", ".join(map(str, cut)) for cut in (report.cut.split_at, report.cut.rerun_at)]
    return [
        f"- stages begin at layer {cuts[0]}; of {METHODS['ppll_delayed']}, whose first ones run twice, at {cuts[1]}"
    ]


def _warnings(results: dict[str, PipelineResult]) -> list[str]:
    return [
        f"- busy machine: {result.method} had only {result.core_share:.0%} of a core where it did not wait; "
        "measure again"
        for result in results.values()
        if result.core_share < LEAST_CORE_SHARE
    ]


def to_json(report: PipelineBenchReport, settings: BenchSettings) -> str:
    """The report with its settings, versions and machine, as JSON text."""
    environment = {"environment": settings.environment}
    return json.dumps({**describe_run(settings), **environment, **asdict(report)}, indent=2)
