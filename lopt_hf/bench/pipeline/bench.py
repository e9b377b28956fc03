"""Cost of pipeline training by method: PPLL beside the same learning in one process, and beside torch's schedules.

All methods train on the same batches, cut into the same micro-batches, with the same optimizer. All pipelines cut the
model at the same layers, but for one whose early stages run forward a second time: by the same rule, it cuts earlier.
Methods take turns, each time in new processes, so that whatever else the machine does hits all of them, and none has
another's memory beside it.
"""

import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from lopt_hf.bench.pipeline.parts import Cut
from lopt_hf.bench.pipeline.report import PipelineBenchReport, PipelineResult
from lopt_hf.bench.pipeline.settings import METHODS, PPLL, SCHEDULES, TWO_STAGES_PER_RANK, BenchSettings
from lopt_hf.bench.processes import run_together
from lopt_hf.common.arithmetic import choose_arithmetic
from lopt_hf.common.tables import interquartile_range

__all__ = ["run_pipeline_bench"]

PIPELINES = (*PPLL, *SCHEDULES)


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

    from lopt_hf.bench.pipeline.method_run import MethodRun
    from lopt_hf.bench.pipeline.tasks import task_of
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
    from lopt_hf.bench.pipeline.parts import divide_stages
    from lopt_hf.bench.pipeline.tasks import task_of
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
    from lopt_hf.bench.pipeline.worker import find_cut

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
    from lopt_hf.bench.pipeline.schedules import train_by_schedule
    from lopt_hf.bench.pipeline.worker import train

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
