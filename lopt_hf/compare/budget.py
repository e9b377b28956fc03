"""A grid within a given time: as many seeds and samples as fit, so that an early stop leaves a balanced comparison.

All methods of one seed come before the next seed. How much of the samples is measured is decided once, for all models,
which are compared on the same ones: all of them, or else a half or a quarter, if all seeds fit with that; else a
quarter and as many whole seeds as fit.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lopt_hf.common.files import write_text
from lopt_hf.compare.grid import Grid, GridRun
from lopt_hf.compare.grid_data import model_folder
from lopt_hf.compare.grid_training import GridTrainingError

__all__ = ["SHARES", "BudgetRecord", "BudgetedRuns", "complete_runs", "parse_budget"]

SHARES = (1.0, 0.5, 0.25)  # of the samples
UNITS = {"minutes": 60.0, "hours": 3600.0}


def parse_budget(text: str) -> float:
    """Returns the seconds of `minutes=180` or `hours=3`.

    Raises:
        ValueError: If it is neither.
    """
    unit, _, number = text.partition("=")
    try:
        seconds = UNITS[unit] * float(number)
    except (KeyError, ValueError):
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError(f"budget={text!r} is no time; give minutes=180 or hours=3.")
    return seconds


@dataclass
class BudgetRecord:
    """What was measured of a grid's times, kept beside its runs so that a command that goes on knows them.

    Parameters:
        share: Share of the samples that is measured; `None` while it is not decided.
        base: Seconds that a model takes to answer all samples, by those that the base took for some.
        train: Seconds of training by the run's name.
        measure: Seconds of measuring by the run's name.
    """

    share: float | None = None
    base: float | None = None
    train: dict[str, float] = field(default_factory=dict)
    measure: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "BudgetRecord":
        """Reads a record; an empty one where there is none."""
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()

    def write(self, path: Path) -> None:
        """Writes the record."""
        write_text(path, json.dumps(vars(self), indent=2))


class BudgetedRuns:
    """Trains and measures runs of a grid while there is time.

    Args:
        grid: The grid.
        seconds: The time from now on.
        record: What is known of times; kept up to date in `path`.
        path: Where it is kept.
        train: Trains runs, `grid.workers` at a time.
        measure: Measures a trained run on the share of the samples.
        say: Tells what fits.
        clock: The time in seconds.
    """

    def __init__(
        self,
        grid: Grid,
        seconds: float,
        record: BudgetRecord,
        path: Path,
        train: Callable[[Sequence[GridRun]], None],
        measure: Callable[[GridRun], None],
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.grid, self.record, self.path = grid, record, path
        self.train, self.measure, self.say, self.clock = train, measure, say, clock
        self.seconds, self.end = seconds, clock() + seconds
        # An average comes after what it is of
        self.runs = sorted(grid.runs(), key=lambda run: (grid.seeds.index(run.seed), run.source is not None))

    def begin(self) -> None:
        """Trains the first runs, one for each worker, and decides by their time on the share of the samples.

        Raises:
            GridTrainingError: If all of them fail.
        """
        to_train = [run for run in self.runs if run.source is None and not model_folder(self.grid, run).is_dir()]
        if not self.record.train and to_train:
            try:
                self._train(to_train[: self.grid.workers])  # as all others will be: so many share the time
            except GridTrainingError:
                if not self.record.train:
                    raise
        if self.record.share is None:
            fitting = [share for share in SHARES if self._projected(self.runs, share) <= self._left()]
            self.record.share = fitting[0] if fitting else SHARES[-1]
            self.record.write(self.path)
        self._say_what_fits()

    def run(self) -> list[str]:
        """Trains and measures what fits; a seed after the first is begun only if all of it does.

        Returns:
            What failed, with the reason.
        """
        failures: list[str] = []
        for seed in self.grid.seeds:
            left = [run for run in self.runs if run.seed == seed and not self.is_done(run)]
            needed = self._projected(left)
            if seed != self.grid.seeds[0] and needed > self._left():
                self._say_stop(f"seed {seed}", needed)
                return failures
            for start in range(0, len(left), self.grid.workers):
                cell = left[start : start + self.grid.workers]
                if (needed := self._projected(cell)) > self._left():
                    self._say_stop(cell[0].name, needed)
                    return failures
                failures += self._run(cell)
        return failures

    def is_done(self, run: GridRun) -> bool:
        """Whether a run is trained and measured."""
        return run.name in self.record.measure and model_folder(self.grid, run).is_dir()

    def _run(self, cell: Sequence[GridRun]) -> list[str]:
        failures = []
        try:
            self._train(cell)
        except GridTrainingError as error:
            failures.append(str(error))
        for run in cell:
            if model_folder(self.grid, run).is_dir():
                start = self.clock()
                self.measure(run)
                self.record.measure[run.name] = self.clock() - start
                self.record.write(self.path)
        return failures

    def _train(self, cell: Sequence[GridRun]) -> None:
        untrained = [run for run in cell if not model_folder(self.grid, run).is_dir()]
        start = self.clock()
        try:
            self.train(cell)
        finally:
            for run in untrained:  # at a time, so each took its share
                if model_folder(self.grid, run).is_dir():
                    self.record.train[run.name] = (self.clock() - start) / len(untrained)
            self.record.write(self.path)

    def _projected(self, runs: Sequence[GridRun], share: float | None = None) -> float:
        """Seconds that runs will take."""
        return sum(self._cost(run, share) for run in runs if not self.is_done(run))

    def _cost(self, run: GridRun, share: float | None) -> float:
        training = 0.0 if model_folder(self.grid, run).is_dir() else self._training(run)
        known = self.record.measure
        if share is None and known:
            return training + max(known.values())
        share = share or self.record.share or 1.0
        return training + share * (self.record.base or 0.0)

    def _training(self, run: GridRun) -> float:
        """Seconds of training: of the same method, at the same rate if it is known, or by rows as any other."""
        known = [(other, self.record.train[other.name]) for other in self.runs if other.name in self.record.train]
        same = [(other, seconds) for other, seconds in known if other.method == run.method]
        alike = [each for each in same if each[0].learning_rate == run.learning_rate]
        if same:
            return max(seconds for _, seconds in alike or same)
        if run.source is not None:
            return 0.0  # seconds, against minutes
        by_rows = [seconds / _rows(other) for other, seconds in known if other.source is None]
        return _rows(run) * max(by_rows, default=0.0)

    def _left(self) -> float:
        return self.end - self.clock()

    def _say_what_fits(self) -> None:
        share = self.record.share
        done = sum(map(self.is_done, self.runs))
        left, seeds = self._left(), []
        for seed in self.grid.seeds:
            left -= self._projected([run for run in self.runs if run.seed == seed])
            if left >= 0:
                seeds.append(str(seed))
        whole = f"seeds {', '.join(seeds)}" if seeds else "not even the first seed, but as many of its runs as can be"
        training = ", ".join(f"{name} in {seconds / 60:.1f} min" for name, seconds in [*self.record.train.items()][:1])
        self.say(
            f"Budget: {self.seconds / 60:.0f} min for {len(self.runs) - done} of {len(self.runs)} runs. Training took "
            f"{training or 'no time'}, and a model answers all samples in about "
            f"{(self.record.base or 0) / 60:.1f} min. With {share:.0%} of the samples all of it would take "
            f"{self._projected(self.runs) / 60:.0f} min; what fits: {whole}."
        )

    def _say_stop(self, what: str, needed: float) -> None:
        self.say(
            f"Budget: stopped before {what}, which takes about {needed / 60:.1f} min, and {self._left() / 60:.1f} are "
            "left. Run it again, with the same output_dir, to go on."
        )


def complete_runs(grid: Grid, is_done: Mapping[str, bool]) -> list[GridRun]:
    """Returns the runs that can be compared: of the seeds that are complete, or of the first as far as it is.

    Args:
        grid: The grid.
        is_done: Whether a run is measured, by its name.

    Raises:
        ValueError: If none is.
    """
    runs = grid.runs()
    by_seed = {seed: [run for run in runs if run.seed == seed] for seed in grid.seeds}
    complete = [run for of_seed in by_seed.values() if all(is_done[each.name] for each in of_seed) for run in of_seed]
    found = complete or [run for run in by_seed[grid.seeds[0]] if is_done[run.name]]
    if not found:
        raise ValueError("budget: no run fits into it, so there is nothing to report; give more minutes.")
    return found


def _rows(run: GridRun) -> int:
    return run.num_train + run.num_replayed
