"""A grid within a given time: what is begun, in which order, where it ends, and how it goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lopt_hf.compare.budget import BudgetedRuns, BudgetRecord, complete_runs, parse_budget
from lopt_hf.compare.grid import Grid, GridRun
from lopt_hf.compare.grid_data import model_folder
from lopt_hf.compare.grid_training import GridTrainingError
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
        self.now, self.done, self.said = 0.0, list[str](), list[str]()
        self.path = folder / "budget.json"

    def train(self, runs: Sequence[GridRun]) -> None:
        for run in runs:
            if not model_folder(self.grid, run).is_dir():
                self.now += TRAINING[run.method] / self.grid.workers
                model_folder(self.grid, run).mkdir(parents=True)

    def measure(self, run: GridRun) -> None:
        share = BudgetRecord.read(self.path).share
        assert share is not None
        self.now += 40 * share
        self.done.append(f"{run.method} {run.seed}")

    def run(self, seconds: float) -> BudgetedRuns:
        record = BudgetRecord.read(self.path)
        record.base = 40.0
        runs = BudgetedRuns(
            *(self.grid, seconds, record, self.path, self.train, self.measure),
            say=self.said.append,
            clock=lambda: self.now,
        )
        runs.begin()
        self.failures = runs.run()
        return runs


# A seed takes 200 s of training and three times a share of 40 s
@pytest.mark.parametrize(
    ("seconds", "share", "seeds"),
    [(960, 1.0, 3), (959, 0.5, 3), (780, 0.5, 3), (779, 0.25, 3), (690, 0.25, 3), (689, 0.25, 2), (459, 0.25, 1)],
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
            model_folder(shop.grid, run).mkdir(parents=True)

    shop.train = at_a_time  # type: ignore[method-assign]
    runs = shop.run(960 - 300)
    assert runs.record.share == 1.0
    assert runs.record.train["e2e_lr0.0001_seed0"] == pytest.approx(50)
    assert shop.now <= 960 - 300 and len(shop.done) == 9


def test_it_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """On the same share of the samples, which are those of the models that are done."""
    shop = Workshop(tmp_path)
    shop.run(460)
    assert len(shop.done) == 6 and "stopped before seed 2, which takes about 3.8 min" in shop.said[-1]
    runs = shop.run(10_000)
    assert shop.done[6:] == ["e2e 2", "LISA 2", "average 2"]
    assert runs.record.share == 0.25 and "for 3 of 9 runs" in shop.said[-1]


def test_of_the_first_seed_as_much_as_fits(tmp_path: Path) -> None:
    """And no run that would not: what is there is compared, of one seed."""
    shop = Workshop(tmp_path)
    runs = shop.run(125)
    assert shop.done == ["e2e 0"] and shop.now == 110
    assert "not even the first seed" in shop.said[0] and "stopped before lisa_lr0.0001_seed0" in shop.said[1]
    found = complete_runs(shop.grid, {run.name: runs.is_done(run) for run in shop.grid.runs()})
    assert [run.name for run in found] == ["e2e_lr0.0001_seed0"]
    with pytest.raises(ValueError, match="no run fits into it"):
        complete_runs(shop.grid, {run.name: False for run in shop.grid.runs()})


def test_a_slower_run_than_projected_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a method's first run took counts for its others."""
    monkeypatch.setitem(TRAINING, "LISA", 300.0)
    shop = Workshop(tmp_path)
    shop.run(960)
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
    compare.main(["--config", str(config), "--budget", "minutes=60"])
    assert len(trained_here) == 2
    change(config, methods={"end-to-end": {"method": "e2e"}, "LISA": {"method": "lisa", "lisa_layers": 9}})
    with pytest.raises(SystemExit) as ended:  # after the report on what is complete
        compare.main(["--config", str(config), "--budget", "minutes=60"])
    assert "lisa_lr0.01_seed0 ended with status 1" in str(ended.value)
    with pytest.raises(SystemExit) as ended:
        compare.main(["--config", str(config), "--budget", "60"])
    assert "budget='60' is no time" in str(ended.value)
