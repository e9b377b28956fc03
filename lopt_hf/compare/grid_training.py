"""Fine-tunes every run of a grid by its command, each in a process of its own, and goes on where it was stopped."""

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from filelock import FileLock
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopt_hf.common.arithmetic import Arithmetic, choose_arithmetic
from lopt_hf.common.files import atomic_file, write_text
from lopt_hf.common.parent import parent_environment
from lopt_hf.common.yaml_files import load_settings, read_yaml
from lopt_hf.compare.grid import Grid, GridRun
from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.loading import load_sft_dataset
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.retention.references import ModelReference

__all__ = [
    "GridTrainingError",
    "arithmetic_argument",
    "check_trained_runs",
    "heldout_rows",
    "model_folder",
    "prepare_data",
    "run_folder",
    "train_grid",
    "training_arithmetic",
]

logger = logging.getLogger(__name__)

LOG_TAIL_LINES = 15
# Arguments of a run that say where the grid's folder is, not what was trained
PLACES = ("output_dir", "dataset_name")


class GridTrainingError(RuntimeError):
    """A run of the grid failed; the others are kept."""


def run_folder(grid: Grid, run: GridRun) -> Path:
    """The folder of one run: its `sft.yaml`, `train.log`, and `model` once it is trained."""
    return grid.output_path / "runs" / run.name


def model_folder(grid: Grid, run: GridRun) -> Path:
    """Where a run's model is; it exists only once the run is complete."""
    return run_folder(grid, run) / "model"


def training_arithmetic(grid: Grid) -> Arithmetic:
    """The type that runs train in where their arguments leave it open."""
    return choose_arithmetic(grid.dtype, "cpu" if grid.training.get("use_cpu") else None)


def arithmetic_argument(grid: Grid, arguments: Mapping[str, Any]) -> dict[str, bool]:
    """The argument that says it, for a run with such arguments; none where they say it themselves."""
    if any(arguments.get(name) is not None for name in ("bf16", "fp16")):
        return {}
    return {"bf16": training_arithmetic(grid).dtype == "bfloat16"}


def prepare_data(grid: Grid) -> None:
    """Writes `data/train.jsonl` and `data/heldout.jsonl`: the rows that fit in `max_length` tokens, as `prompt` and
    `completion`. Those that are there are used again if they were made with the same settings.

    Raises:
        FileNotFoundError: If a data set is not there.
        ValueError: If its layout has no prompt and completion, too few rows fit, or runs were trained on data made
            with other settings.
    """
    record = grid.output_path / "data" / "settings.json"
    settings = {
        "train_dataset": grid.train_dataset,
        "heldout_dataset": grid.heldout_dataset,
        "training.max_length": grid.training["max_length"],
        "model": grid.model,
    }
    parts = {
        "dataset_config": grid.dataset_config,
        "train_split": grid.train_split,
        "heldout_split": grid.heldout_split,
    }
    settings |= {name: value for name, value in parts.items() if value not in (None, "train")}
    if (grid.train_dataset, grid.train_split) == (grid.heldout_dataset, grid.heldout_split):
        logger.warning(
            "held-out rows are of the split that is trained on (%s, %s): the gain may be of rows seen in training; "
            "set heldout_split or heldout_dataset.",
            grid.heldout_dataset,
            grid.heldout_split,
        )
    is_trained = any((grid.output_path / "runs").glob("*/model"))
    stored = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else None
    if is_trained and stored is not None:
        _check_same(settings, stored, f"the data of the runs in {grid.output_path}", "delete that folder")
    elif is_trained:
        logger.warning("%s is not there: whether the data were made with these settings is unknown.", record)
    is_stale = stored != settings and not is_trained
    if is_stale:
        record.unlink(missing_ok=True)  # first: what a kill leaves half prepared is prepared again
    counts = {"train": max(run.num_train for run in grid.runs()), "heldout": grid.num_heldout}
    for name, count in counts.items():
        target = grid.output_path / "data" / f"{name}.jsonl"
        if is_stale or not target.is_file():
            _prepare(grid, name, target)
        with target.open(encoding="utf-8") as rows:
            fitting = sum(1 for _ in rows)
        if fitting < count:
            raise ValueError(
                f"num_{name}={count}, but only {fitting} rows of {settings[f'{name}_dataset']} fit in "
                f"max_length={grid.training['max_length']}; lower the one or raise the other."
            )
    if is_stale:
        write_text(record, json.dumps(settings, indent=2))


def heldout_rows(grid: Grid) -> list[dict[str, Any]]:
    """The held-out rows, the same for every model."""
    dataset = load_sft_dataset(str(grid.output_path / "data" / "heldout.jsonl"))
    assert isinstance(dataset, Dataset)
    return list(dataset.select(range(grid.num_heldout)))


def check_trained_runs(grid: Grid) -> None:
    """Compares what the runs that are there were trained with and what the settings say now.

    Raises:
        ValueError: At the first difference; names the run, the argument and both values.
    """
    for run in grid.runs():
        if model_folder(grid, run).is_dir():
            _check_trained(grid, run)


def train_grid(grid: Grid) -> None:
    """Trains what is not trained yet, `workers` runs at a time.

    Raises:
        ValueError: Before anything is trained, if a run was trained with other settings.
        GridTrainingError: After all other runs, if some failed; names the first with the end of its log.
    """
    check_trained_runs(grid)
    runs = grid.runs()
    with (
        ThreadPoolExecutor(grid.workers) as pool,
        tqdm(total=len(runs), desc="fine-tuning", unit="run") as progress,
    ):
        pending = [pool.submit(_train, grid, run) for run in runs]
        failures: list[str] = []
        try:
            for done in as_completed(pending):
                failures += done.result()
                progress.update()
        finally:
            pool.shutdown(cancel_futures=True)
    if failures:
        raise GridTrainingError(f"{len(failures)} of {len(runs)} runs failed. {failures[0]}")


def _prepare(grid: Grid, name: str, target: Path) -> None:
    """Writes the rows of one data set that fit."""
    of_train, of_heldout = (grid.train_dataset, grid.train_split), (grid.heldout_dataset, grid.heldout_split)
    source, split = of_train if name == "train" else of_heldout
    max_length = int(grid.training["max_length"])
    dataset = to_trl_format(load_sft_dataset(source, grid.dataset_config, split))
    columns = set(dataset.column_names or ())
    if not {"prompt", "completion"} <= columns or isinstance(next(iter(dataset))["prompt"], str):
        raise ValueError(
            f"{name}_dataset={source} has the columns {sorted(columns)}; a comparison needs prompts and completions "
            "as messages, so that the loss of an answer can be told; give it those, or one of the question-and-answer "
            "layouts of lopt-hf sft."
        )
    ModelReference.find(grid.model)  # says what is wrong with it
    fitting = dataset.select_columns(["prompt", "completion"]).filter(
        _fits,
        fn_kwargs={"tokenizer": AutoTokenizer.from_pretrained(resolve_model(grid.model)), "max_length": max_length},
        desc=f"{name}: rows within {max_length} tokens",
    )
    assert isinstance(fitting, Dataset)
    with atomic_file(target) as partial:
        fitting.to_json(partial)


def _fits(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= max_length


def _arguments(grid: Grid, run: GridRun, output_dir: Path) -> dict[str, Any]:
    """What the run's command is told."""
    return {
        **run.command_arguments,
        **arithmetic_argument(grid, run.arguments),
        "model_name_or_path": resolve_model(grid.model),
        "dataset_name": str(grid.output_path / "data" / "train.jsonl"),
        "dataset_max_samples": run.num_train,
        "output_dir": str(output_dir),
    }


def _check_trained(grid: Grid, run: GridRun) -> None:
    model = model_folder(grid, run)
    config = model.with_name("sft.yaml")
    stored = load_settings(config) if config.is_file() else {}
    now = read_yaml(yaml.safe_dump(_arguments(grid, run, model)), run.name)
    if config.is_file() and not stored.get("fp16"):
        stored.setdefault("bf16", True)  # TRL's default, when a grid did not yet say it
        if arithmetic_argument(grid, run.arguments) and stored["bf16"] != now["bf16"]:
            before = "bfloat16" if stored["bf16"] else "float32"
            raise ValueError(
                f"run {run.name}: trained in {before}, but now it would be {training_arithmetic(grid).description}; "
                f"set dtype to {before} to go on as it began, or another output_dir, or delete {model.parent} to "
                "train anew."
            )
    settings, trained = ({k: v for k, v in each.items() if k not in PLACES} for each in (now, stored))
    _check_same(settings, trained, f"run {run.name}", f"delete {model.parent}")


def _check_same(now: Mapping[str, Any], stored: Mapping[str, Any], what: str, remedy: str) -> None:
    for name in (*now, *stored):
        before, after = (values.get(name, "not set") for values in (stored, now))
        if before != after:
            raise ValueError(
                f"{what}: made with {name}={before!r}, and now {name} is {after!r}; set another output_dir, or "
                f"{remedy} to train anew."
            )


def _train(grid: Grid, run: GridRun) -> list[str]:
    """Trains one run; returns what went wrong, if anything did."""
    model = model_folder(grid, run)
    if model.is_dir():
        return []
    model.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(model.with_name("train.lock")):
        if model.is_dir():  # by another command, which was waited for
            _check_trained(grid, run)
            return []
        for stale in model.parent.glob("model.partial-*"):
            shutil.rmtree(stale, ignore_errors=True)
        return _train_alone(grid, run)


def _train_alone(grid: Grid, run: GridRun) -> list[str]:
    """As `_train`, with the run's lock held."""
    folder = run_folder(grid, run)
    partial = folder / f"model.partial-{os.getpid()}"  # a killed command's process may still write to its own
    config = folder / "sft.yaml"
    config.write_text(yaml.safe_dump(_arguments(grid, run, partial), sort_keys=False), encoding="utf-8")
    threads = max(1, torch.get_num_threads() // grid.workers)
    with (folder / "train.log").open("w", encoding="utf-8") as log:
        result = subprocess.run(
            [sys.executable, "-m", f"lopt_hf.scripts.{run.command}", "--config", str(config)],
            env={**os.environ, **parent_environment(), "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if result.returncode == 0 and partial.is_dir():
        partial.replace(model_folder(grid, run))
        return []
    shutil.rmtree(partial, ignore_errors=True)
    lines = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    tail = "\n".join(lines)
    return [f"{run.name} ended with status {result.returncode}; the end of {folder / 'train.log'}:\n{tail}"]
