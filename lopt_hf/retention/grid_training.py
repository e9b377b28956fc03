"""Fine-tunes every run of a grid by `lopt-hf sft`, each in a process of its own, and goes on where it was stopped."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopt_hf.data.formats import load_sft_dataset, to_trl_format
from lopt_hf.pretrained import resolve_model
from lopt_hf.retention.files import whole_file
from lopt_hf.retention.grid import Grid, GridRun

__all__ = ["GridTrainingError", "heldout_rows", "model_folder", "prepare_data", "run_folder", "train_grid"]

LOG_TAIL_LINES = 15


class GridTrainingError(RuntimeError):
    """A run of the grid failed; the others are kept."""


def run_folder(grid: Grid, run: GridRun) -> Path:
    """The folder of one run: its `sft.yaml`, `train.log`, and `model` once it is trained."""
    return grid.output_path / "runs" / run.name


def model_folder(grid: Grid, run: GridRun) -> Path:
    """Where a run's model is; it exists only once the run is complete."""
    return run_folder(grid, run) / "model"


def prepare_data(grid: Grid) -> None:
    """Writes `data/train.jsonl` and `data/heldout.jsonl`: the rows that fit in `max_length` tokens, as `prompt` and
    `completion`.

    Raises:
        FileNotFoundError: If a data set is not there.
        ValueError: If its layout has no prompt and completion, or too few rows fit.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(grid.model))
    max_length = int(grid.training["max_length"])
    needed = {"train": (grid.train_dataset, grid.num_train), "heldout": (grid.heldout_dataset, grid.num_heldout)}
    for name, (source, count) in needed.items():
        target = grid.output_path / "data" / f"{name}.jsonl"
        if target.is_file():
            continue
        dataset = to_trl_format(load_sft_dataset(source))
        if not {"prompt", "completion"} <= set(dataset.column_names or ()):
            raise ValueError(
                f"{name}_dataset={source} has the columns {dataset.column_names}; a comparison needs prompts and "
                "completions, so that the loss of an answer can be told."
            )
        fitting = dataset.select_columns(["prompt", "completion"]).filter(
            _fits,
            fn_kwargs={"tokenizer": tokenizer, "max_length": max_length},
            desc=f"{name}: rows within {max_length} tokens",
        )
        assert isinstance(fitting, Dataset)
        if len(fitting) < count:
            raise ValueError(
                f"num_{name}={count}, but only {len(fitting)} rows of {source} fit in max_length={max_length}; lower "
                "the one or raise the other."
            )
        with whole_file(target) as partial:
            fitting.to_json(partial)


def heldout_rows(grid: Grid) -> list[dict[str, Any]]:
    """The held-out rows, the same for every model."""
    dataset = load_sft_dataset(str(grid.output_path / "data" / "heldout.jsonl"))
    assert isinstance(dataset, Dataset)
    return list(dataset.select(range(grid.num_heldout)))


def train_grid(grid: Grid) -> Iterator[GridRun]:
    """Trains what is not trained yet, `workers` runs at a time, and yields each run once its model is there.

    Raises:
        GridTrainingError: After all other runs, if some failed; names the first with the end of its log.
    """
    failures: list[str] = []
    runs = grid.runs()
    with (
        ThreadPoolExecutor(grid.workers) as pool,
        tqdm(total=len(runs), desc="fine-tuning", unit="run") as progress,
    ):
        pending = {pool.submit(_train, grid, run): run for run in runs}
        try:
            for done in as_completed(pending):
                error = done.result()
                progress.update()
                if error is None:
                    yield pending[done]
                else:
                    failures.append(error)
        finally:
            pool.shutdown(cancel_futures=True)
    if failures:
        raise GridTrainingError(f"{len(failures)} of {len(runs)} runs failed. {failures[0]}")


def _fits(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= max_length


def _train(grid: Grid, run: GridRun) -> str | None:
    """Trains one run; returns what went wrong, if anything did."""
    model = model_folder(grid, run)
    if model.is_dir():
        return None
    folder = run_folder(grid, run)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"model.partial-{os.getpid()}"  # another process may still be at the run that a kill left
    arguments = {
        **run.arguments,
        "model_name_or_path": resolve_model(grid.model),
        "dataset_name": str(grid.output_path / "data" / "train.jsonl"),
        "dataset_max_samples": grid.num_train,
        "output_dir": str(partial),
    }
    config = folder / "sft.yaml"
    config.write_text(yaml.safe_dump(arguments, sort_keys=False), encoding="utf-8")
    threads = max(1, (os.cpu_count() or 1) // grid.workers)
    with (folder / "train.log").open("w", encoding="utf-8") as log:
        result = subprocess.run(
            [sys.executable, "-m", "lopt_hf.scripts.sft", "--config", str(config)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    if result.returncode != 0 or not partial.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        tail = (folder / "train.log").read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return f"{run.name} ended with status {result.returncode}; the end of {folder / 'train.log'}:\n" + "\n".join(
            tail
        )
    if model.is_dir():
        shutil.rmtree(partial)
    else:
        partial.replace(model)
    return None
