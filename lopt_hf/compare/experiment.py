"""Evaluation of every run of a grid, and the comparison of methods over their seeds."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lm_eval.api.task import Task

from lopt_hf.compare.contrasts import Margin, MethodPoint, matched_contrasts, rate_contrasts
from lopt_hf.compare.grid import Grid, GridRun
from lopt_hf.compare.grid_data import heldout_rows, model_folder
from lopt_hf.compare.grid_training import arithmetic_argument, training_arithmetic
from lopt_hf.retention.benchmark import Candidate, RetentionBenchmark, flips
from lopt_hf.retention.comparisons import adjusted
from lopt_hf.retention.evaluation import EvaluationSettings, answer_seconds
from lopt_hf.retention.representations import LayerSimilarity, with_similarity
from lopt_hf.retention.results import Contrast, RetentionReport
from lopt_hf.retention.scores import ScoreCache
from lopt_hf.retention.suites import SuiteTask, load_entries

__all__ = ["GridEvaluation", "point_label"]


PROBE = 8  # the share of the samples, as its inverse, by which the time of all is told


def thinned(settings: EvaluationSettings, tasks: Sequence[Task], share: float) -> dict[str, list[int]]:
    """Returns the first samples of each task, a share of those that the settings name, and at least one."""
    chosen = {task.task_name: settings.indices(task) or list(range(len(task.eval_docs))) for task in tasks}
    return {name: indices[: math.ceil(share * len(indices))] for name, indices in chosen.items()}


def point_label(method: str, learning_rate: float) -> str:
    """Name of a method at a rate in tables and plots."""
    return f"{method}, {learning_rate:g}"


class GridEvaluation:
    """Scores the models of a grid and compares methods.

    Args:
        grid: The settings; data must have been prepared (`prepare_data`).
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        include_path = [] if grid.include_path is None else [Path(grid.include_path)]
        self.benchmark = RetentionBenchmark(
            grid.model,
            load_entries([SuiteTask(name) for name in grid.tasks], include_path),
            EvaluationSettings(
                samples=grid.samples,
                batch_size=grid.eval_batch_size,
                dtype=grid.dtype if grid.eval_dtype == "auto" else grid.eval_dtype,
            ),
            ScoreCache(grid.output_path / "scores"),
            heldout_rows(grid),
            margin=grid.margin,
            cluster_by=grid.cluster_by,
        )
        self.similarity = LayerSimilarity(
            self.benchmark.baseline, self.benchmark.settings.dtype, self.benchmark.cache.folder
        )

    def describe_arithmetic(self) -> str:
        """In which types the grid trains and measures, and why, in one line."""
        return (
            f"Arithmetic: training in {training_arithmetic(self.grid).description} (where bf16 and fp16 are unset); "
            f"measuring in {self.benchmark.arithmetic.description}."
        )

    def time_base(self) -> tuple[float, float]:
        """Times the base on an eighth of the samples.

        Returns:
            Seconds of loading it, and those in which it would answer all samples.
        """
        tasks = [task for entry in self.benchmark.entries for task in entry.tasks]
        settings = replace(self.benchmark.settings, samples=thinned(self.benchmark.settings, tasks, 1 / PROBE))
        loading, answering = answer_seconds(self.benchmark.baseline, self.benchmark.entries, settings)
        return loading, PROBE * answering

    def measured(self) -> list[str]:
        """Names of what is measured: they are others if the tasks, samples, type or versions are."""
        return [path.stem for path in self.benchmark.score_files(self.benchmark.baseline.name)]

    def measure_base(self) -> None:
        """Measures the base, so that the first run's time is its own."""
        self.benchmark.scores(self.benchmark.baseline.name)
        self.similarity.prepare()

    def with_share(self, share: float) -> "GridEvaluation":
        """Returns an evaluation on a share of each task's samples, the first ones; held-out answers stay all."""
        if share == 1:
            return self
        tasks = [task for entry in self.benchmark.entries for task in entry.tasks]
        return GridEvaluation(replace(self.grid, samples=thinned(self.benchmark.settings, tasks, share)))

    def measure(self, run: GridRun) -> bool:
        """Measures one run, so that a report finds it done.

        Returns:
            Whether all was answered now: with scores of an earlier command, its time tells nothing.
        """
        label = point_label(run.method, run.learning_rate)
        model = str(model_folder(self.grid, run))
        is_new = not any(path.is_file() for path in self.benchmark.score_files(model))
        self.benchmark.compare([Candidate(label, run.method, (model,))])
        self.similarity(self.benchmark.reference(model))
        return is_new

    def report(self, runs: Sequence[GridRun] | None = None) -> RetentionReport:
        """Compares methods and rates, each over its seeds.

        Args:
            runs: Those to compare, of each method and rate the same seeds. Default: all.
        """
        runs = self.grid.runs() if runs is None else runs
        points = list(dict.fromkeys((run.method, run.learning_rate) for run in runs))
        candidates = [Candidate(point_label(*point), point[0], tuple(self._models(runs, *point))) for point in points]
        report = self.benchmark.compare(candidates)
        assert report is not None  # only distributed launches have other processes
        references = {each.label: [self.benchmark.reference(model) for model in each.models] for each in candidates}
        report = with_similarity(report, references, self.similarity)
        first = {point_label(run.method, run.learning_rate): run for run in reversed(runs)}
        models = (
            replace(model, family=first[model.label].family, command=first[model.label].command_line)
            for model in report.models
        )
        report = replace(report, models=tuple(models))
        contrasts = tuple(self._contrasts(runs))
        return adjusted(replace(report, settings={**report.settings, **self._settings(runs)}, contrasts=contrasts))

    def flips(self, runs: Sequence[GridRun] | None = None) -> Iterator[dict[str, Any]]:
        """The samples that each run's model answers otherwise than the baseline, as `benchmark.flips`."""
        before = self.benchmark.scores(self.benchmark.baseline.name)
        for run in self.grid.runs() if runs is None else runs:
            label = f"{point_label(run.method, run.learning_rate)}, seed {run.seed}"
            yield from flips(label, before, self.benchmark.scores(str(model_folder(self.grid, run))))

    def _models(self, runs: Sequence[GridRun], method: str, learning_rate: float) -> list[str]:
        chosen = [run for run in runs if (run.method, run.learning_rate) == (method, learning_rate)]
        return [str(model_folder(self.grid, run)) for run in chosen]

    def _points(self, runs: Sequence[GridRun], method: str) -> list[MethodPoint]:
        rates = dict.fromkeys(run.learning_rate for run in runs if run.method == method)
        return [
            MethodPoint(
                point_label(method, rate),
                rate,
                [self.benchmark.scores(model) for model in self._models(runs, method, rate)],
            )
            for rate in rates
        ]

    def _contrasts(self, runs: Sequence[GridRun]) -> list[Contrast]:
        benchmark = self.benchmark
        found: list[Contrast] = []
        baseline = benchmark.scores(benchmark.baseline.name)
        margin = Margin(benchmark.margin, baseline)
        for first, second in self.grid.contrasts:
            points = self._points(runs, first), self._points(runs, second)
            if not all(points):  # not trained yet
                continue
            found += rate_contrasts(*points, benchmark.entries, benchmark.confidence, margin)
            found += matched_contrasts(*points, baseline, benchmark.entries, benchmark.confidence, margin)
        return found

    def _settings(self, runs: Sequence[GridRun]) -> dict[str, Any]:
        grid = self.grid
        counts = {run.method: run.num_train for run in runs if run.source is None}
        rows = f"{grid.num_train} rows for each run"
        rows += "".join(f", {count} of {method}" for method, count in counts.items() if count != grid.num_train)
        replayed = {run.method: run.num_replayed for run in runs if run.replay_share}
        text = grid.replay_dataset or "prose that every Python carries"
        general = {
            "replay_dataset": f"{text}: "
            + ", ".join(f"{count} rows more of {name}" for name, count in replayed.items())
        }
        return {
            "train_dataset": f"{grid.train_dataset}, split {grid.train_split}: {rows}",
            "heldout_dataset": f"{grid.heldout_dataset}, split {grid.heldout_split}: {grid.num_heldout} rows",
            **(general if replayed else {}),
            "seeds": list(dict.fromkeys(run.seed for run in runs)),
            "training": {**grid.training, **arithmetic_argument(grid, grid.training)},
        }
