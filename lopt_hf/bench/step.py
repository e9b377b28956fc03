"""Cost of one training step by method: bytes of activations, gradients and optimizer state, time, resident memory.

Every method trains in a spawned process of its own, by a real trainer, beside a process that trains end-to-end on the
same batches. The parent lets one of the two at a time do one step, in turns, so that whatever else the machine does
hits both alike, and each has a peak resident memory of its own. torch and the trainers are imported there only.
"""

import json
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from tempfile import TemporaryDirectory
from typing import Any

from lopt_hf.bench.processes import (
    GRACE_SECONDS,
    MALLOC,
    BenchWorkerError,
    changed_environment,
    one_gpu,
    receive,
)
from lopt_hf.bench.step_settings import StepBenchSettings, StepRow, make_rows
from lopt_hf.bench.step_worker import work
from lopt_hf.bench.training import num_layers
from lopt_hf.common.arithmetic import choose_arithmetic
from lopt_hf.common.compared_methods import CUTS
from lopt_hf.common.tables import describe_run, interquartile_range, markdown_table, mega, ratio_text

__all__ = ["BenchWorkerError", "StepBenchSettings", "StepResult", "run_step_bench", "to_json", "to_markdown"]


@dataclass(frozen=True)
class StepResult:
    """Cost of one method.

    A method whose steps differ (`local_update_interval` n, BAdam's layers) is measured over whole cycles: peaks are
    averaged over one cycle; the time is the mean over the cycle of the median at each of its n positions.

    Attributes:
        method: Name of the row.
        dtype: Type of the arithmetic, `"float32"` or `"bfloat16"`.
        peak_saved_bytes: Peak bytes that autograd keeps for backward in a step, see `SavedBytes`.
        saved_bytes_ratio: The same relative to `e2e` in this run; `None` without `e2e`.
        peak_gradient_bytes: Peak bytes that parameters hold in `.grad` in a step, see `GradientBytes`.
        gradient_bytes_ratio: The same relative to `e2e` in this run; `None` without `e2e`.
        optimizer_bytes: Most bytes of the optimizer's state at the end of a step.
        optimizer_bytes_ratio: The same relative to `e2e` in this run; `None` without `e2e`.
        step_seconds: Time per step (forward, backward, clipping, optimizer), without fetching the batch.
        step_seconds_ratio: The same relative to the `e2e` steps taken in turns with it; `None` without `e2e`.
        step_seconds_iqr: Interquartile range of the step time in seconds, taken at each position of the cycle.
        baseline_step_seconds: Time per step of those `e2e` steps; `None` without `e2e`.
        peak_resident_bytes: Peak resident memory of the method's process, from start to end.
        peak_cuda_bytes: Peak of torch's CUDA allocator in that process; `None` without CUDA.
        final_loss: Task loss in nats per token at step `final_loss_step`, the last one that all methods reached.
        final_loss_step: That step, counted from 1.
        timed_seconds: Every timed step, in order.
        saved_bytes: Peak of every memory step, in order.
        gradient_bytes: Likewise of the gradients.
        state_bytes: Likewise of the optimizer's state.
    """

    method: str
    dtype: str
    peak_saved_bytes: float
    saved_bytes_ratio: float | None
    peak_gradient_bytes: float
    gradient_bytes_ratio: float | None
    optimizer_bytes: int
    optimizer_bytes_ratio: float | None
    step_seconds: float
    step_seconds_ratio: float | None
    step_seconds_iqr: float
    baseline_step_seconds: float | None
    peak_resident_bytes: int
    peak_cuda_bytes: int | None
    final_loss: float
    final_loss_step: int
    timed_seconds: list[float]
    saved_bytes: list[int]
    gradient_bytes: list[int]
    state_bytes: list[int]


def run_step_bench(settings: StepBenchSettings, progress: bool = True) -> list[StepResult]:
    """Measures every method of `settings`, each in turns with end-to-end training if that is among them.

    Two processes are alive at a time, each with its weights and optimizer state: 2 to 3 GB for SmolLM2-135M.

    Args:
        settings: What to measure.
        progress: Show a progress bar on stderr.

    Returns:
        One result for each row: end-to-end first, then in the order of `settings`.

    Raises:
        ValueError: If the model cannot be loaded or does not fit the settings.
        BenchWorkerError: If a method's process fails. The other is ended.
    """
    from tqdm.auto import tqdm

    from lopt_hf.data.pretrained import resolve_model

    checkpoint = resolve_model(settings.model)
    _check_model(settings, checkpoint)
    settings = replace(settings, dtype=choose_arithmetic(settings.dtype).dtype)
    groups = _groups(make_rows(settings))
    total = sum(row.total_steps for group in groups for row in group)
    with (
        tqdm(total=total, unit="step", disable=not progress) as bar,
        TemporaryDirectory(prefix="lopt_bench_", ignore_cleanup_errors=True) as folder,
    ):
        measured = []
        for group in groups:
            bar.set_description(f"loading: {group[-1].name}")
            measured.append(_measure(group, settings, checkpoint, folder, bar.set_description, bar.update))
    return _results(measured, settings.dtype)


def _groups(rows: list[StepRow]) -> list[list[StepRow]]:
    """The rows that are measured together: each method beside end-to-end training of as many steps."""
    baseline = [row for row in rows if row.method == "e2e"]
    others = [row for row in rows if row.method != "e2e"]
    if not baseline or not others:
        return [[row] for row in rows]
    return [[replace(baseline[0], timed_steps=row.timed_steps), row] for row in others]


@dataclass
class _Measured:
    """The raw measurements of one process."""

    row: StepRow
    saved_bytes: list[int] = field(default_factory=list)
    gradient_bytes: list[int] = field(default_factory=list)
    state_bytes: list[int] = field(default_factory=list)
    timed_seconds: list[float] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    @property
    def peak_saved_bytes(self) -> float:
        return statistics.fmean(self.saved_bytes)

    @property
    def peak_gradient_bytes(self) -> float:
        return statistics.fmean(self.gradient_bytes)

    @property
    def optimizer_bytes(self) -> int:
        return max(self.state_bytes)  # in the first cycle it is there once a block has been trained, and stays

    @property
    def step_seconds(self) -> float:
        return _over_cycle(self.timed_seconds, self.row.interval, statistics.median)


def _measure(
    group: list[StepRow],
    settings: StepBenchSettings,
    checkpoint: str,
    folder: str,
    describe: Callable[[str], None],
    advance: Callable[[], Any],
) -> list[_Measured]:
    """Runs the processes of one group, one step of one of them at a time."""
    measured = [_Measured(row) for row in group]
    with ExitStack() as stack:
        workers = [stack.enter_context(_Worker(row, settings, checkpoint, folder)) for row in group]
        for worker in workers:
            worker.wait_until_ready()

        def step(index: int, task: str) -> Any:
            describe(f"{task}: {workers[index].row.name}")
            cost = workers[index].step(task)
            advance()
            return cost

        members = range(len(workers))
        for index in members:
            for _ in range(group[index].interval):
                saved, gradients, state = step(index, "memory")
                measured[index].saved_bytes.append(saved)
                measured[index].gradient_bytes.append(gradients)
                measured[index].state_bytes.append(state)
        for _ in range(settings.warmup):
            for index in members:
                step(index, "warm-up")
        for turn in range(group[0].timed_steps):
            for index in members if turn % 2 == 0 else reversed(members):  # neither always goes first
                measured[index].timed_seconds.append(step(index, "time"))
        for worker, result in zip(workers, measured, strict=True):
            result.summary = worker.finish()
    return measured


def _check_model(settings: StepBenchSettings, checkpoint: str) -> None:
    from lopt_hf.local.blocks import split_layers

    layers = num_layers(settings.model, checkpoint, settings.seq_length)
    if set(CUTS) & set(settings.methods) and max(settings.num_blocks) > layers:
        raise ValueError(f"num_blocks={settings.num_blocks}: the model has {layers} layers; use at most {layers}.")
    if settings.split_at is not None:
        split_layers(layers, len(settings.split_at) + 1, settings.split_at)


class _Worker:
    """The parent's end of one method's process, which ends with the `with` block."""

    def __init__(self, row: StepRow, settings: StepBenchSettings, checkpoint: str, folder: str) -> None:
        self.row = row
        context = multiprocessing.get_context("spawn")  # a forked child would inherit the parent's threads and memory
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs, row, settings, checkpoint, folder), daemon=True)
        with changed_environment({**MALLOC[settings.malloc], **one_gpu()}):
            self._process.start()
        theirs.close()  # so that the end of the process ends the pipe

    def wait_until_ready(self) -> None:
        self._receive("ready")

    def step(self, task: str) -> Any:
        """Lets the process do one step; returns its peaks of bytes (`task="memory"`) or its seconds."""
        self._connection.send(task)
        return self._receive("ready")

    def finish(self) -> dict[str, Any]:
        """Lets the process leave the training loop; returns its summary."""
        self._connection.send("finish")
        return self._receive("finished")

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()  # a process that waits for its turn ends by itself
        self._process.join(timeout=GRACE_SECONDS)
        self._process.terminate()
        self._process.join()

    def _receive(self, expected: str) -> Any:
        kind, content = receive(self.row.name, self._connection, self._process)
        if kind != expected:
            raise BenchWorkerError(f"{self.row.name}: its process is {kind} before its time.")
        return content


def _results(groups: list[list[_Measured]], dtype: str) -> list[StepResult]:
    """One result for each row; what was measured of end-to-end training beside each method is put together."""
    common = min(len(measured.summary["losses"]) for group in groups for measured in group)
    baselines = [group[0] for group in groups if len(group) == 2]
    results = []
    if baselines:
        together = replace(baselines[0], timed_seconds=[s for base in baselines for s in base.timed_seconds])
        together.summary["peak_resident_bytes"] = max(base.summary["peak_resident_bytes"] for base in baselines)
        results.append(_result(together, together, common, dtype))
    for group in groups:
        baseline = group[0] if group[0].row.method == "e2e" else None
        results.append(_result(group[-1], baseline, common, dtype))
    return results


def _result(measured: _Measured, baseline: _Measured | None, common_step: int, dtype: str) -> StepResult:
    return StepResult(
        method=measured.row.name,
        dtype=dtype,
        peak_saved_bytes=measured.peak_saved_bytes,
        saved_bytes_ratio=measured.peak_saved_bytes / baseline.peak_saved_bytes if baseline else None,
        peak_gradient_bytes=measured.peak_gradient_bytes,
        gradient_bytes_ratio=measured.peak_gradient_bytes / baseline.peak_gradient_bytes if baseline else None,
        optimizer_bytes=measured.optimizer_bytes,
        optimizer_bytes_ratio=measured.optimizer_bytes / baseline.optimizer_bytes if baseline else None,
        step_seconds=measured.step_seconds,
        step_seconds_ratio=measured.step_seconds / baseline.step_seconds if baseline else None,
        step_seconds_iqr=_over_cycle(measured.timed_seconds, measured.row.interval, interquartile_range),
        baseline_step_seconds=baseline.step_seconds if baseline else None,
        peak_resident_bytes=measured.summary["peak_resident_bytes"],
        peak_cuda_bytes=measured.summary["peak_cuda_bytes"],
        final_loss=measured.summary["losses"][common_step - 1],
        final_loss_step=common_step,
        timed_seconds=measured.timed_seconds,
        saved_bytes=measured.saved_bytes,
        gradient_bytes=measured.gradient_bytes,
        state_bytes=measured.state_bytes,
    )


def _over_cycle(values: Sequence[float], interval: int, statistic: Callable[[Sequence[float]], float]) -> float:
    """The statistic at each position of the interval's cycle, averaged over the cycle."""
    return statistics.fmean(statistic(values[position::interval]) for position in range(interval))


def to_markdown(results: Sequence[StepResult]) -> str:
    """The results as a markdown table; MB is 10^6 bytes."""
    with_cuda = any(result.peak_cuda_bytes is not None for result in results)
    header = ["method", "saved for backward (MB)", "x e2e", "gradients (MB)", "x e2e", "optimizer (MB)", "x e2e"]
    header += ["time per step (s)", "x e2e", "IQR (s)", "peak RSS (MB)"]
    header += ["peak CUDA (MB)"] if with_cuda else []
    header += [f"loss at step {results[0].final_loss_step}" if results else "loss"]
    rows = []
    for result in results:
        cells = [result.method, mega(result.peak_saved_bytes), ratio_text(result.saved_bytes_ratio)]
        cells += [mega(result.peak_gradient_bytes), ratio_text(result.gradient_bytes_ratio)]
        cells += [mega(result.optimizer_bytes), ratio_text(result.optimizer_bytes_ratio)]
        cells += [
            f"{result.step_seconds:.3f}",
            ratio_text(result.step_seconds_ratio),
            f"{result.step_seconds_iqr:.3f}",
        ]
        cells += [mega(result.peak_resident_bytes)]
        cells += [mega(result.peak_cuda_bytes)] if with_cuda else []
        rows.append([*cells, f"{result.final_loss:.3f}"])
    return markdown_table(header, rows)


def to_json(results: Sequence[StepResult], settings: StepBenchSettings) -> str:
    """The results with their settings, versions and machine, as JSON text."""
    return json.dumps({**describe_run(settings), "results": [asdict(result) for result in results]}, indent=2)
