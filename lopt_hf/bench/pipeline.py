"""Cost of pipeline training by method: PPLL beside the same learning in one process, and beside torch's schedules.

All methods train on the same batches, cut into the same micro-batches, with the same optimizer. All pipelines cut the
model at the same layers, but for one whose early stages run forward a second time: by the same rule, it cuts earlier.
Methods take turns, each time in new processes, so that whatever else the machine does hits
all of them, and none has another's memory beside it.
"""

import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lopt_hf.bench.pipeline_parts import Cut
from lopt_hf.bench.pipeline_settings import (
    DELAYED,
    METHODS,
    PPLL,
    SCHEDULES,
    TWO_STAGES_PER_RANK,
    BenchSettings,
)
from lopt_hf.bench.processes import BenchWorkerError, run_together
from lopt_hf.common.arithmetic import choose_arithmetic
from lopt_hf.common.tables import describe_run, interquartile_range, markdown_table, mega, ratio_text

__all__ = ["BenchWorkerError", "PipelineBenchReport", "PipelineResult", "run_pipeline_bench", "to_json", "to_markdown"]

PIPELINES = (*PPLL, *SCHEDULES)
LEAST_CORE_SHARE = 0.9  # ours: what is lost beyond that is as large as the differences of interest
NAMES = {name: METHODS[name].removesuffix(", end-to-end") for name in (*PIPELINES, "e2e")}
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
        saved_bytes: For each stage the peak bytes that autograd keeps for backward in a step, see `SavedBytes`, and
            what may wait in the channels between stages and for a delayed gradient.
        queued_bytes: The latter, for each stage.
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


def run_pipeline_bench(settings: BenchSettings, progress: bool = True) -> PipelineBenchReport:
    """Measures every method of `settings`.

    As many processes as stages are alive at a time, with 4 to 5 GB together for SmolLM2-135M.

    Args:
        settings: What to measure.
        progress: Show a progress bar on stderr.

    Raises:
        ValueError: If the model cannot be loaded or does not fit the settings.
        BenchWorkerError: If a method's process fails. The others are ended.
    """
    from tqdm.auto import tqdm

    from lopt_hf.bench.pipeline_run import MethodRun
    from lopt_hf.bench.pipeline_tasks import task_of
    from lopt_hf.common.host_store import host_store

    settings = replace(settings, dtype=choose_arithmetic(settings.dtype, "cpu").dtype)
    store = host_store()
    measured: dict[str, list[_Round]] = {method: [] for method in settings.methods}
    with (
        tqdm(unit="step", disable=not progress) as bar,
        TemporaryDirectory(prefix="lopt_bench_", ignore_cleanup_errors=True) as folder,
    ):
        checkpoint = task_of(settings).find_model(settings, folder)
        cut = _given_cut(settings, checkpoint)
        if cut is None:
            bar.set_description("measuring the cut")
            cut = _find_cut(settings, checkpoint)
        runs = [
            MethodRun(method, settings, checkpoint, cut, f"{folder}/{method}-{turn}", store.port)
            for turn in range(settings.rounds)
            for method in settings.methods[:: 1 if turn % 2 == 0 else -1]  # none always goes first
        ]
        bar.reset(sum(run.total_steps for run in runs))
        for run in runs:
            bar.set_description(METHODS[run.method])
            measured[run.method].append(_measure(run, bar.update))
    baseline = _median_step(measured[settings.one_process]) if settings.one_process in measured else None
    results = {method: _result(method, settings, rounds, baseline) for method, rounds in measured.items()}
    return PipelineBenchReport(settings.dtype, cut, results, settings.unit)


def _given_cut(settings: BenchSettings, checkpoint: str) -> Cut | None:
    """Checks that the model fits the settings; returns its cut unless that is to be measured."""
    from lopt_hf.bench.pipeline_parts import divide_stages
    from lopt_hf.bench.pipeline_tasks import task_of
    from lopt_hf.local.blocks import split_layers

    layers = task_of(settings).num_layers(settings, checkpoint)
    if settings.stages > layers:
        raise ValueError(f"stages={settings.stages}: the model has {layers} layers; use at most {layers}.")
    if settings.stages * settings.parts_per_stage > layers:
        raise ValueError(
            f"stages={settings.stages}: the model has {layers} layers, and some methods have two stages on each rank; "
            f"use at most {layers // 2}, or leave out {', '.join(TWO_STAGES_PER_RANK)}."
        )
    blocks = split_layers(layers, settings.stages, settings.split_at)
    if settings.split_at is None and settings.split == "auto":
        return None
    split_at = [block.start for block in blocks[1:]]
    return Cut(split_at, divide_stages(split_at, layers, settings.parts_per_stage), split_at)


def _find_cut(settings: BenchSettings, checkpoint: str) -> Cut:
    from lopt_hf.bench.pipeline_worker import find_cut

    arguments = [(checkpoint, settings)] * settings.stages
    return run_together("measuring the cut", find_cut, arguments, settings.environment)[0]


@dataclass(frozen=True)
class _Round:
    """What the processes of a method measured in one round."""

    load: float
    first_timed: int
    num_timed: int
    records: list[Any]

    @property
    def step_seconds(self) -> list[float]:
        ends = [max(times) for times in zip(*(record.ends for record in self.records), strict=True)]
        timed = range(self.first_timed, self.first_timed + self.num_timed)
        return [ends[step] - ends[step - 1] for step in timed]

    @property
    def loss(self) -> float:
        """Of the last timed step, from the last process that has it: in the form of a V the first rank does."""
        losses = next(record.losses for record in reversed(self.records) if record.losses)
        return losses[self.first_timed + self.num_timed - 1]


def _measure(run: Any, on_step: Callable[[], object]) -> _Round:
    from lopt_hf.bench.pipeline_schedules import train_by_schedule
    from lopt_hf.bench.pipeline_worker import train

    load = os.getloadavg()[0]
    settings = run.settings
    work = train_by_schedule if run.method in SCHEDULES else train
    ranks = range(settings.stages if run.method in PIPELINES else 1)
    arguments = [(rank, run) for rank in ranks]
    records = run_together(METHODS[run.method], work, arguments, settings.environment, on_step)
    return _Round(load, settings.warmup, settings.steps, records)


def _median_step(rounds: Sequence[_Round]) -> float:
    return statistics.median(seconds for one in rounds for seconds in one.step_seconds)


def _result(method: str, settings: BenchSettings, rounds: Sequence[_Round], baseline: float | None) -> PipelineResult:
    step_seconds = [seconds for one in rounds for seconds in one.step_seconds]
    tokens = settings.units_per_step
    third, first = np.quantile(step_seconds, (0.75, 0.25)).tolist()
    by_stage = list(zip(*(one.records for one in rounds), strict=True))
    queued_bytes = [max(record.queued_bytes for record in stage) for stage in by_stage]
    saved_bytes = [max(record.saved_bytes for record in stage) for stage in by_stage]
    return PipelineResult(
        method=METHODS[method],
        tokens_per_second=tokens / statistics.median(step_seconds),
        speedup=None if baseline is None else baseline / statistics.median(step_seconds),
        step_seconds=step_seconds,
        step_seconds_iqr=interquartile_range(step_seconds),
        tokens_per_second_quartiles=(tokens / third, tokens / first),
        waiting=[statistics.fmean(r.waiting for r in stage) for stage in by_stage] if method in PIPELINES else [],
        cpu_seconds=[statistics.fmean(record.cpu_seconds for record in stage) for stage in by_stage],
        core_share=min(record.core_share for one in rounds for record in one.records),
        saved_bytes=[saved + queued for saved, queued in zip(saved_bytes, queued_bytes, strict=True)],
        queued_bytes=queued_bytes,
        peak_resident_bytes=[max(record.peak_resident_bytes for record in stage) for stage in by_stage],
        loss=rounds[-1].loss,
        load=[one.load for one in rounds],
    )


# ---- The report ----


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
