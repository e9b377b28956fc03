"""Fine-tunes every run of a grid by its command, each in a process of its own, and goes on where it was stopped."""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock
from tqdm.auto import tqdm

from lopt_hf.common.arithmetic import Arithmetic, choose_arithmetic
from lopt_hf.common.files import write_text
from lopt_hf.common.parent import parent_environment
from lopt_hf.common.yaml_files import load_settings, read_yaml
from lopt_hf.compare.averaging import save_average
from lopt_hf.compare.grid import Grid, GridRun
from lopt_hf.compare.grid_data import check_same, model_folder, run_folder
from lopt_hf.compare.replay import write_mixture
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.retention.references import ModelReference, fingerprint

__all__ = [
    "GridTrainingError",
    "arithmetic_argument",
    "check_trained_runs",
    "is_current",
    "train_grid",
    "train_runs",
    "training_arithmetic",
]

LOG_TAIL_LINES = 15
# Arguments of a run that say where the grid's folder is, not what was trained
PLACES = ("output_dir", "dataset_name")
BASE_RECORD = "base.txt"  # the fingerprint of the base that a run began from
SOURCE_RECORD = "average_of.txt"  # the fingerprint of the model that an average was made of


class GridTrainingError(RuntimeError):
    """A run of the grid failed; the others are kept."""


def training_arithmetic(grid: Grid) -> Arithmetic:
    """The type that runs train in where their arguments leave it open."""
    return choose_arithmetic(grid.dtype, "cpu" if grid.training.get("use_cpu") else None)


def arithmetic_argument(grid: Grid, arguments: Mapping[str, Any]) -> dict[str, bool]:
    """The argument that says it, for a run with such arguments; none where they say it themselves."""
    if any(arguments.get(name) is not None for name in ("bf16", "fp16")):
        return {}
    return {"bf16": training_arithmetic(grid).dtype == "bfloat16"}


def check_trained_runs(grid: Grid) -> None:
    """Compares what the runs that are there were trained with and what the settings say now.

    Raises:
        ValueError: At the first difference; names the run, the argument and both values. Also if the base is no longer
            the one that a run began from.
    """
    trained = [run for run in grid.runs() if model_folder(grid, run).is_dir()]
    base = _base_fingerprint(grid) if trained else ""
    for run in trained:
        _check_trained(grid, run, base)


def train_grid(grid: Grid) -> None:
    """Trains what is not trained yet, `workers` runs at a time, and then makes the averages.

    Raises:
        ValueError: Before anything is trained, if a run was trained with other settings.
        GridTrainingError: After all other runs, if some failed; names the first with the end of its log.
    """
    check_trained_runs(grid)
    train_runs(grid, grid.runs())


def train_runs(grid: Grid, runs: Sequence[GridRun]) -> None:
    """As `train_grid`, for some of the runs, whose settings have been checked."""
    trained, averages = ([run for run in runs if (run.source is None) == is_trained] for is_trained in (True, False))
    failures: list[str] = []
    base = _base_fingerprint(grid)
    with (
        ThreadPoolExecutor(grid.workers) as pool,
        tqdm(total=len(runs), desc="fine-tuning", unit="run") as progress,
    ):
        for part in (trained, averages):
            pending = [pool.submit(_train, grid, run, base) for run in part]
            try:
                for done in as_completed(pending):
                    failures += done.result()
                    progress.update()
            finally:
                for waiting in pending:
                    waiting.cancel()
    if failures:
        raise GridTrainingError(f"{len(failures)} of {len(runs)} runs failed. {failures[0]}")


def _base_fingerprint(grid: Grid) -> str:
    """What identifies the base as it is now."""
    return ModelReference.find(grid.model).fingerprint()


def _arguments(grid: Grid, run: GridRun, output_dir: Path) -> dict[str, Any]:
    """What the run's command is told; of an average what it is of."""
    if run.source is not None:
        return {"average_of": run.source, "alpha": run.alpha, "model_name_or_path": resolve_model(grid.model)}
    data = run_folder(grid, run) / "train.jsonl" if run.replay_share else grid.output_path / "data" / "train.jsonl"
    return {
        **run.command_arguments,
        **arithmetic_argument(grid, run.arguments),
        "model_name_or_path": resolve_model(grid.model),
        "dataset_name": str(data),
        "dataset_max_samples": run.num_train + run.num_replayed,
        "output_dir": str(output_dir),
    }


def _check_trained(grid: Grid, run: GridRun, base: str) -> None:
    model = model_folder(grid, run)
    if model.with_name(BASE_RECORD).read_text(encoding="utf-8") != base:
        raise ValueError(
            f"run {run.name}: trained from model={grid.model!r} as it was before its files changed; set another "
            f"output_dir, or delete {model.parent} to train anew."
        )
    config = model.with_name("sft.yaml")
    stored = load_settings(config) if config.is_file() else {}
    now = read_yaml(yaml.safe_dump(_arguments(grid, run, model)), run.name)
    if arithmetic_argument(grid, run.arguments) and stored.get("bf16") not in (None, now.get("bf16")):
        before = "bfloat16" if stored["bf16"] else "float32"
        raise ValueError(
            f"run {run.name}: trained in {before}, but now it would be {training_arithmetic(grid).description}; "
            f"set dtype to {before} to go on as it began, or another output_dir, or delete {model.parent} to "
            "train anew."
        )
    settings, trained = ({k: v for k, v in each.items() if k not in PLACES} for each in (now, stored))
    check_same(settings, trained, f"run {run.name}", f"delete {model.parent}")


def _train(grid: Grid, run: GridRun, base: str) -> list[str]:
    """Trains one run, or makes an average; returns what went wrong, if anything did.

    Args:
        grid: The settings.
        run: The run.
        base: The base's fingerprint.
    """
    model = model_folder(grid, run)
    if is_current(grid, run):
        return []
    model.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(model.with_name("train.lock")):
        if is_current(grid, run):  # by another command, which was waited for
            _check_trained(grid, run, base)
            return []
        for stale in model.parent.glob("model.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        write_text(model.with_name(BASE_RECORD), base)
        return _train_alone(grid, run) if run.source is None else _average(grid, run)


def _train_alone(grid: Grid, run: GridRun) -> list[str]:
    """As `_train`, with the run's lock held."""
    folder = run_folder(grid, run)
    partial = folder / f"model.partial-{os.getpid()}"  # a killed command's process may still write to its own
    config = folder / "sft.yaml"
    config.write_text(yaml.safe_dump(_arguments(grid, run, partial), sort_keys=False), encoding="utf-8")
    if run.replay_share:
        write_mixture(run, grid.output_path / "data", folder / "train.jsonl")
    threads = max(1, torch.get_num_threads() // (grid.workers * run.num_processes))
    with (folder / "train.log").open("w", encoding="utf-8") as log:
        result = subprocess.run(
            [sys.executable, "-m", f"lopt_hf.scripts.{run.command}", "--config", str(config)],
            env={**os.environ, **parent_environment(), "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if result.returncode == 0 and partial.is_dir():
        if run.arguments.get("method") == "osf":
            # Loaded in another type, the base is decomposed otherwise than the adapter was trained beside
            partial = _with_base(grid, partial, 1.0, folder / f"model.partial-{os.getpid()}-merged")
        partial.replace(model_folder(grid, run))
        return []
    shutil.rmtree(partial, ignore_errors=True)
    lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    tail = "\n".join(lines)
    return [f"{run.name} ended with status {result.returncode}; the end of {folder / 'train.log'}:\n{tail}"]


def _with_base(grid: Grid, model: Path, alpha: float, folder: Path) -> Path:
    """Moves a model to a folder as its average with the base."""
    save_average(grid.model, model, alpha, folder)
    shutil.rmtree(model)
    return folder


def _source(grid: Grid, run: GridRun) -> Path:
    """The folder of the model that an average is of."""
    assert run.source is not None
    return model_folder(grid, replace(run, method=run.source, source=None))


def is_current(grid: Grid, run: GridRun) -> bool:
    """Whether a run's model is there; an average is not if the model that it was made of is no longer as it was."""
    if run.source is None or not model_folder(grid, run).is_dir():
        return model_folder(grid, run).is_dir()
    record = run_folder(grid, run) / SOURCE_RECORD
    source = _source(grid, run)
    known = record.read_text(encoding="utf-8") if record.is_file() else ""
    return source.is_dir() and known == fingerprint(str(source))


def _average(grid: Grid, run: GridRun) -> list[str]:
    """Makes an average, with its lock held."""
    source, folder = _source(grid, run), run_folder(grid, run)
    if not source.is_dir():
        return [f"{run.name} is an average of {source}, which is not there; it failed or was deleted."]
    shutil.rmtree(model_folder(grid, run), ignore_errors=True)
    partial = folder / f"model.partial-{os.getpid()}"
    write_text(folder / "sft.yaml", yaml.safe_dump(_arguments(grid, run, partial), sort_keys=False))
    try:
        save_average(grid.model, source, run.alpha, partial)
    except ValueError as error:
        return [f"{run.name}: {error}"]
    write_text(folder / SOURCE_RECORD, fingerprint(str(source)))
    partial.replace(model_folder(grid, run))
    return []
