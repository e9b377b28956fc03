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
from lopt_hf.compare.grid_training import GridTrainingError, is_current
from lopt_hf.retention.records import read_record

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
        load: Seconds that loading the base took, which are the same for any share.
        measured: What is measured, by the names of all that decides it; `None` in records of earlier versions.
        measure_base: Seconds of measuring the base on the share; `None` until it is.
        train: Seconds of training by the run's name.
        measure: Seconds of measuring by the run's name; 0 where an earlier command had answered some of it.
    """

    share: float | None = None
    base: float | None = None
    load: float = 0.0
    measured: list[str] | None = None
    measure_base: float | None = None
    train: dict[str, float] = field(default_factory=dict)
    measure: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "BudgetRecord":
        """Reads a record; an empty one where there is none.

        Raises:
            ValueError: If it is damaged.
        """
        if not path.is_file():
            return cls()
        remedy = "delete it, and what fits is decided anew"
        try:
            return cls(**read_record(path, remedy))
        except TypeError as error:  # a name that is none of ours
            raise ValueError(f"{path} is damaged ({error}); {remedy}.") from error

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
        measure: Measures a trained run on the share of the samples; returns whether all was answered now.
        measure_base: Measures the base on them.
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
        measure: Callable[[GridRun], bool],
        measure_base: Callable[[], None],
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.grid, self.record, self.path = grid, record, path
        self.train, self.measure, self.measure_base, self.say, self.clock = train, measure, measure_base, say, clock
        self.seconds, self.end = seconds, clock() + seconds
        # An average comes after what it is of
        self.runs = sorted(grid.runs(), key=lambda run: (grid.seeds.index(run.seed), run.source is not None))
        self._averages: dict[str, bool] = {}  # which are there: telling it reads the whole model that each is of
        self._is_prepared = False

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
        return run.name in self.record.measure and self._is_there(run)

    def _is_there(self, run: GridRun) -> bool:
        """As `is_current`, which is asked of an average once until something is trained."""
        if run.source is None:
            return is_current(self.grid, run)
        if run.name not in self._averages:
            self._averages[run.name] = is_current(self.grid, run)
        return self._averages[run.name]

    def _run(self, cell: Sequence[GridRun]) -> list[str]:
        failures = []
        self._prepare()
        try:
            self._train(cell)
        except GridTrainingError as error:
            failures.append(str(error))
        for run in cell:
            if self._is_there(run):
                start = self.clock()
                is_new = self.measure(run)
                self.record.measure[run.name] = self.clock() - start if is_new else 0.0
                self.record.write(self.path)
        return failures

    def _prepare(self) -> None:
        """Measures the base, once: its time is no run's."""
        if self._is_prepared:
            return
        start = self.clock()
        self.measure_base()
        self._is_prepared = True
        if self.record.measure_base is None:
            self.record.measure_base = self.clock() - start
            self.record.write(self.path)

    def _train(self, cell: Sequence[GridRun]) -> None:
        untrained = [run for run in cell if not self._is_there(run)]
        for run in untrained:
            self.record.measure.pop(run.name, None)  # of a model that was deleted, or is no longer what it was
        start = self.clock()
        try:
            self.train(cell)
        finally:
            if untrained:
                self._averages.clear()
            for run in untrained:  # at a time, so each took its share
                if self._is_there(run):
                    self.record.train[run.name] = (self.clock() - start) / len(untrained)
            self.record.write(self.path)

    def _projected(self, runs: Sequence[GridRun], share: float | None = None) -> float:
        """Seconds that runs will take, and before them the base if it is not measured yet."""
        left = [run for run in runs if not self.is_done(run)]
        training = sum(self._training(run) for run in left if not self._is_there(run))
        base = self._by_probe(share) if left and self.record.measure_base is None else 0.0
        return training + base + len(left) * self._measuring(share)

    def _measuring(self, share: float | None) -> float:
        """Seconds of measuring a run: the most that one took, or by what the base took for some samples."""
        known = [seconds for seconds in self.record.measure.values() if seconds]
        return max(known) if share is None and known else self._by_probe(share)

    def _by_probe(self, share: float | None) -> float:
        share = share or self.record.share or 1.0
        return self.record.load + share * (self.record.base or 0.0)

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
        seeds = [
            str(seed)
            for number, seed in enumerate(self.grid.seeds, 1)
            if self._projected([run for run in self.runs if run.seed in self.grid.seeds[:number]]) <= self._left()
        ]
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
