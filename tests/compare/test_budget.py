"""A grid within a given time: what is begun, in which order, where it ends, and how it goes on."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lopt_hf.compare.budget import BudgetedRuns, BudgetRecord, complete_runs, parse_budget
from lopt_hf.compare.experiment import GridEvaluation
from lopt_hf.compare.grid import Grid, GridRun, load_grid
from lopt_hf.compare.grid_data import model_folder, prepare_data
from lopt_hf.compare.grid_training import SOURCE_RECORD, GridTrainingError, train_grid
from lopt_hf.retention import evaluation, representations
from lopt_hf.retention.references import ModelReference, fingerprint
from lopt_hf.scripts import compare
from tests.compare.changes import change

METHODS = {"average": {"average_of": "e2e", "alpha": 0.5}, "e2e": {"method": "e2e"}, "LISA": {"method": "lisa"}}
TRAINING = {"e2e": 100.0, "LISA": 100.0, "average": 0.0}


class Workshop:
    """A grid of three methods and three seeds on a clock that training and measuring put forward."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        given = {"learning_rates": [1e-4], "training": {"max_length": 64}, "tasks": ["piqa"], "seeds": [0, 1, 2]}
        names = {name: "x" for name in ("model", "train_dataset", "heldout_dataset")}
        self.grid = Grid(**{**names, "methods": METHODS, **given, "output_dir": str(folder), **settings})
        self.now, self.load, self.done, self.said = 0.0, 0.0, list[str](), list[str]()
        self.path = folder / "budget.json"

    def train(self, runs: Sequence[GridRun]) -> None:
        for run in runs:
            if not model_folder(self.grid, run).is_dir():
                self.now += TRAINING[run.method] / self.grid.workers
                self.make(run)
            elif run.source is not None:
                self.make(run)

    def make(self, run: GridRun) -> None:
        """What training leaves, each time other weights; of an average what it is of."""
        folder = model_folder(self.grid, run)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "weights.txt").write_text(str(self.now))
        if run.source is not None:
            source = model_folder(self.grid, replace(run, method=run.source, source=None))
            folder.with_name(SOURCE_RECORD).write_text(fingerprint(str(source)))

    def measure(self, run: GridRun) -> bool:
        self.answer()
        self.done.append(f"{run.method} {run.seed}")
        return True

    def answer(self) -> None:
        share = BudgetRecord.read(self.path).share
        assert share is not None
        self.now += self.load + 40 * share

    def begun(self, seconds: float) -> BudgetedRuns:
        record = BudgetRecord.read(self.path)
        record.load, record.base = self.load, 40.0
        runs = BudgetedRuns(
            *(self.grid, seconds, record, self.path, self.train, self.measure, self.answer),
            say=self.said.append,
            clock=lambda: self.now,
        )
        runs.begin()
        return runs

    def run(self, seconds: float) -> BudgetedRuns:
        runs = self.begun(seconds)
        self.failures = runs.run()
        return runs


# A seed takes 200 s of training and three times a share of 40 s, and the base has to answer once
@pytest.mark.parametrize(
    ("seconds", "share", "seeds"),
    [(1000, 1.0, 3), (999, 0.5, 3), (800, 0.5, 3), (799, 0.25, 3), (700, 0.25, 3), (699, 0.25, 2), (469, 0.25, 1)],
)
def test_samples_give_way_before_seeds(tmp_path: Path, seconds: float, share: float, seeds: int) -> None:
    shop = Workshop(tmp_path)
    runs = shop.run(seconds)
    assert runs.record.share == share
    assert shop.done == [f"{name} {seed}" for seed in range(seeds) for name in ("e2e", "LISA", "average")]
    assert shop.now <= seconds
    chosen = ", ".join(map(str, range(seeds)))
    assert f"With {share:.0%} of the samples" in shop.said[0] and f"what fits: seeds {chosen}." in shop.said[0]
    assert (len(shop.said) > 1) == (seeds < 3)
    found = complete_runs(shop.grid, {run.name: runs.is_done(run) for run in shop.grid.runs()})
    assert {run.seed for run in found} == set(range(seeds)) and len(found) == 3 * seeds


def test_the_first_runs_are_as_many_as_train_at_a_time(tmp_path: Path) -> None:
    """One alone would tell twice the time that each of two takes, and cost samples for which there is time."""
    shop = Workshop(tmp_path, workers=2)

    def at_a_time(runs: Sequence[GridRun]) -> None:
        untrained = [run for run in runs if not model_folder(shop.grid, run).is_dir()]
        shop.now += max((TRAINING[run.method] for run in untrained), default=0)  # each on its share of the cores
        for run in untrained:
            shop.make(run)

    shop.train = at_a_time  # type: ignore[method-assign]
    runs = shop.run(1000 - 300)
    assert runs.record.share == 1.0
    assert runs.record.train["e2e_lr0.0001_seed0"] == pytest.approx(50)
    assert shop.now <= 1000 - 300 and len(shop.done) == 9


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """On the same share of the samples, which are those of the models that are done."""
    shop = Workshop(tmp_path)
    shop.run(470)
    assert len(shop.done) == 6 and "stopped before seed 2, which takes about 3.8 min" in shop.said[-1]
    runs = shop.run(10_000)
    assert shop.done[6:] == ["e2e 2", "LISA 2", "average 2"]
    assert runs.record.share == 0.25 and "for 3 of 9 runs" in shop.said[-1]


def test_of_the_first_seed_as_much_as_fits(tmp_path: Path) -> None:
    """And no run that would not: what is there is compared, of one seed."""
    shop = Workshop(tmp_path)
    runs = shop.run(135)
    assert shop.done == ["e2e 0"] and shop.now == 120
    assert "not even the first seed" in shop.said[0] and "stopped before lisa_lr0.0001_seed0" in shop.said[1]
    found = complete_runs(shop.grid, {run.name: runs.is_done(run) for run in shop.grid.runs()})
    assert [run.name for run in found] == ["e2e_lr0.0001_seed0"]
    with pytest.raises(ValueError, match="no run fits into it"):
        complete_runs(shop.grid, {run.name: False for run in shop.grid.runs()})


def test_a_slower_run_than_projected_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method's first run took counts for its others."""
    monkeypatch.setitem(TRAINING, "LISA", 300.0)
    shop = Workshop(tmp_path)
    shop.run(1000)
    assert {name[-1] for name in shop.done} == {"0"} and len(shop.done) == 3
    assert "stopped before seed 1, which takes about 8.7 min" in shop.said[-1]


def test_workers_train_at_a_time_and_a_failure_ends_nothing(tmp_path: Path) -> None:
    shop = Workshop(tmp_path, workers=2)
    train = shop.train

    def failing(runs: Sequence[GridRun]) -> None:
        train([run for run in runs if run.method != "LISA"])
        if any(run.method == "LISA" for run in runs):
            raise GridTrainingError("LISA failed")

    shop.train = failing  # type: ignore[method-assign]
    shop.run(10_000)
    assert shop.done == [f"{name} {seed}" for seed in range(3) for name in ("e2e", "average")]
    assert shop.failures == ["LISA failed"] * 3


@pytest.mark.parametrize("workers", [1, 3])
def test_an_average_of_a_model_that_is_no_more_is_made_and_measured_again(tmp_path: Path, workers: int) -> None:
    shop = Workshop(tmp_path, workers=workers)
    runs = shop.run(10_000)
    (e2e,) = (run for run in runs.runs if run.name == "e2e_lr0.0001_seed1")
    shop.make(e2e)  # as a command without a budget trains it anew
    (average,) = (run for run in runs.runs if run.source and run.seed == 1)
    assert not shop.begun(10_000).is_done(average)
    shop.run(10_000)
    assert shop.done[9:] == ["average 1"]
    shutil.rmtree(model_folder(shop.grid, e2e))
    assert not shop.begun(10_000).is_done(average)
    shop.run(10_000)
    assert shop.done[10:] == ["e2e 1", "average 1"]
    assert len(shop.run(10_000).record.measure) == 9 and len(shop.done) == 12


def test_a_model_that_is_trained_anew_is_not_measured_yet(tmp_path: Path) -> None:
    """Not even if the command is killed before it is."""
    shop = Workshop(tmp_path)
    runs = shop.run(10_000)
    shutil.rmtree(model_folder(shop.grid, runs.runs[0]))

    def killed(run: GridRun) -> bool:
        raise KeyboardInterrupt

    shop.measure = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        shop.run(10_000)
    assert not shop.begun(10_000).is_done(runs.runs[0])


def test_the_bases_time_is_no_runs(tmp_path: Path) -> None:
    """It is measured once, before the runs; and no time tells of scores that an earlier command left."""
    shop = Workshop(tmp_path)
    record = shop.run(800).record
    assert record.measure_base == 20 and set(record.measure.values()) == {20}
    shop = Workshop(tmp_path / "known")
    answered = shop.measure

    def from_the_cache(run: GridRun) -> bool:
        return answered(run) if run.seed else False

    shop.measure = from_the_cache  # type: ignore[method-assign]
    runs = shop.begun(10_000)
    runs.run()
    assert [runs.record.measure[run.name] for run in runs.runs] == [0.0] * 3 + [40.0] * 6


@pytest.mark.parametrize(("seconds", "share"), [(1000, 0.5), (999, 0.25)])
def test_loading_takes_the_same_time_for_any_share(tmp_path: Path, seconds: float, share: float) -> None:
    """Ten models answer in all: 600 s of training, and 20 s of loading and a share of 40 s for each."""
    shop = Workshop(tmp_path)
    shop.load = 20.0
    assert shop.run(seconds).record.share == share
    assert shop.now <= seconds and len(shop.done) == 9


@pytest.mark.parametrize(("text", "seconds"), [("minutes=180", 10_800), ("hours=0.5", 1800)])
def test_a_budget_is_a_time(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["180", "minutes", "minutes=", "minutes=-1", "minutes=nan", "days=1"])
def test_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="is no time; give minutes=180 or hours=3"):
        parse_budget(text)


def test_the_command(config: Path, tmp_path: Path, trained_here: list[str], capsys: pytest.CaptureFixture) -> None:
    """On half of the samples, both seeds; the record decides, and the report says how many were measured."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "budget.json").write_text(json.dumps({"share": 0.5, "base": 1.0}))
    change(config, methods={"end-to-end": {"method": "e2e"}}, contrasts=[], samples={"tiny_sums": 7})
    compare.main(["--config", str(config), "--budget", "minutes=60"])
    assert trained_here == ["end-to-end_lr0.01_seed0", "end-to-end_lr0.01_seed1"]
    report = json.loads((out / "report.json").read_text())
    (model,) = report["models"]
    sizes = {delta["task"]: delta["n"] for delta in model["deltas"]}
    assert sizes["tiny_sums"] == 4 and model["gain"]["n"] == 6 and report["settings"]["seeds"] == [0, 1]
    assert "Budget: 60 min for 2 of 2 runs." in capsys.readouterr().out
    stored = json.loads((out / "budget.json").read_text())
    assert set(stored["train"]) == set(stored["measure"]) == set(trained_here)
    (out / "budget.json").write_text(json.dumps({**stored, "measured": None}))  # as earlier versions left it
    compare.main(["--config", str(config), "--budget", "minutes=60"])
    assert len(trained_here) == 2 and json.loads((out / "budget.json").read_text()) == stored
    change(config, methods={"end-to-end": {"method": "e2e"}, "LISA": {"method": "lisa", "lisa_layers": 9}})
    with pytest.raises(SystemExit) as ended:  # after the report on what is complete
        compare.main(["--config", str(config), "--budget", "minutes=60"])
    assert "lisa_lr0.01_seed0 ended with status 1" in str(ended.value)
    with pytest.raises(SystemExit) as ended:
        compare.main(["--config", str(config), "--budget", "60"])
    assert "budget='60' is no time" in str(ended.value)


def test_the_probe_answers_an_eighth_each_time(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is told apart, as it is no more for all samples; and no answer of an earlier probe is taken."""
    grid = load_grid(config)
    prepare_data(grid)
    now, asked = [0.0], list[int]()
    load, evaluate = evaluation.load_language_model, evaluation.evaluate_tasks

    def slow_load(*arguments: Any) -> Any:
        now[0] += 5
        return load(*arguments)

    def slow_evaluate(*arguments: Any) -> Any:
        now[0] += 1
        found = evaluate(*arguments)
        asked.extend(len(scores) for scores in found.values())
        return found

    monkeypatch.setattr(evaluation, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(evaluation, "load_language_model", slow_load)
    monkeypatch.setattr(evaluation, "evaluate_tasks", slow_evaluate)
    for _ in range(2):
        assert GridEvaluation(grid).time_base() == (5.0, 8.0)
    assert asked == [2, 2] * 2  # of 12 questions and texts


def test_other_tasks_are_measured_anew(
    config: Path,
    tmp_path: Path,
    trained_here: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """A run that was done on one sample is not done on others, and their times are not those of it."""
    command = ["--config", str(config), "--budget", "minutes=60"]
    record = tmp_path / "out" / "budget.json"
    bases = [800.0, 80.0, 8.0]
    monkeypatch.setattr(GridEvaluation, "time_base", lambda self: (1.0, bases.pop()))
    change(config, methods={"end-to-end": {"method": "e2e"}}, contrasts=[], seeds=[0], tasks=["tiny_text"])
    change(config, samples={"tiny_text": 1})
    compare.main(command)
    compare.main(command)
    first = json.loads(record.read_text())
    assert len(bases) == 2 and (first["load"], first["base"]) == (1.0, 8.0)
    assert first["measure"][trained_here[0]] > 0 and "measured anew" not in capsys.readouterr().out
    change(config, tasks=["tiny_text", "tiny_sums"], samples={})
    compare.main(command)
    assert "Budget: tasks, samples, type or versions are not those of" in capsys.readouterr().out
    second = json.loads(record.read_text())
    assert second["base"] == 80.0 and second["train"] == first["train"] and len(trained_here) == 1
    assert second["measure"][trained_here[0]] == 0.0  # the held-out answers are those of before
    record.write_text('{"share": 0.5, "ba')
    with pytest.raises(SystemExit) as ended:
        compare.main(command)
    assert f"{record} is damaged (Unterminated string" in str(ended.value) and "delete it" in str(ended.value)
    record.write_text('{"share": 0.5, "bass": 1.0}')
    with pytest.raises(
        SystemExit, match="budget.json is damaged .*'bass'.*; delete it, and what fits is decided anew"
    ):
        compare.main(command)


def test_the_base_is_measured_before_the_first_run(
    config: Path, trained_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the time of that run holds no answer and no hidden state of the base."""
    grid = load_grid(config, seeds=[0], methods={"end-to-end": {"method": "e2e"}}, contrasts=[])
    prepare_data(grid)
    train_grid(grid)
    scores = GridEvaluation(grid)
    scores.measure_base()
    loaded: list[str] = []

    def spied(load: Callable[..., Any], reference: ModelReference, *others: Any) -> Any:
        loaded.append(reference.name)
        return load(reference, *others)

    for module, name in ((evaluation, "load_language_model"), (representations, "load_merged")):
        monkeypatch.setattr(module, name, partial(spied, getattr(module, name)))
    assert scores.measure(grid.runs()[0])
    assert loaded == [str(model_folder(grid, grid.runs()[0]))] * 2
    assert not scores.measure(grid.runs()[0])  # which is known by now
