"""The data of a grid: rows that fit, of the task, of its held-out part, and of general text; and where runs are."""

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lopt_hf.common.files import atomic_file, write_text
from lopt_hf.compare.grid import Grid, GridRun
from lopt_hf.compare.replay import general_rows
from lopt_hf.data.damage import BUILDERS
from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.loading import load_sft_dataset
from lopt_hf.data.pretrained import resolve_model
from lopt_hf.retention.records import read_record
from lopt_hf.retention.references import ModelReference

__all__ = ["check_same", "heldout_rows", "model_folder", "prepare_data", "run_folder"]

logger = logging.getLogger(__name__)

BEGUN = {"state": "being prepared"}  # a record of data that are not all there yet, which says that they are ours
CONTENT = "content of "  # and the setting that names data here: what identifies them, in the records of what was made


def run_folder(grid: Grid, run: GridRun) -> Path:
    """The folder of one run: its `sft.yaml`, `train.log`, and `model` once it is trained."""
    return grid.output_path / "runs" / run.name


def model_folder(grid: Grid, run: GridRun) -> Path:
    """Where a run's model is; it exists only once the run is complete."""
    return run_folder(grid, run) / "model"


def prepare_data(grid: Grid) -> None:
    """Writes `data/train.jsonl` and `data/heldout.jsonl`: the rows that fit in `max_length` tokens, as `prompt` and
    `completion`. Those that are there are used again if they were made with the same settings, of the same data.

    Raises:
        FileNotFoundError: If a data set is not there.
        ValueError: If its layout has no prompt and completion, too few rows fit, or runs were trained on data made
            with other settings or of files that have changed; or if files of somebody else's would be lost.
    """
    _check_sources(grid)
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
    settings |= _contents(grid, "train_dataset", "heldout_dataset")
    if (grid.train_dataset, grid.train_split) == (grid.heldout_dataset, grid.heldout_split):
        logger.warning(
            "held-out rows are of the split that is trained on (%s, %s): the gain may be of rows seen in training; "
            "set heldout_split or heldout_dataset.",
            grid.heldout_dataset,
            grid.heldout_split,
        )
    is_trained = any((grid.output_path / "runs").glob("*/model"))
    remedy = (
        f"delete {record.parent}, and the data are prepared again; or this file alone, and they are taken as they are "
        "where runs were trained on them"
    )
    stored = _read_own(record, "train_dataset", remedy)
    if is_trained and stored is not None:
        check_same(settings, stored, f"the data of the runs in {grid.output_path}", "delete that folder")
    elif is_trained:
        logger.warning("%s is not there: whether the data were made with these settings is unknown.", record)
    is_stale = not is_trained and (stored is None or _difference(settings, stored) is not None)
    if stored is None and is_stale:
        _check_free(record, "train.jsonl", "heldout.jsonl")
    counts = {"train": max(run.num_train for run in grid.runs()), "heldout": grid.num_heldout}
    for name, count in counts.items():
        target = grid.output_path / "data" / f"{name}.jsonl"
        if is_stale or not target.is_file():
            source, split = getattr(grid, f"{name}_dataset"), getattr(grid, f"{name}_split")
            config = None if Path(source).expanduser().is_file() else grid.dataset_config  # which is the other's
            _prepare(
                grid,
                name,
                to_trl_format(load_sft_dataset(source, config, split)),
                target,
                record if is_stale else None,
            )
        _check_count(grid, f"num_{name}={count}", count, target, settings[f"{name}_dataset"])
    if is_stale:
        write_text(record, json.dumps(settings, indent=2))
    _prepare_replay(grid)


def heldout_rows(grid: Grid) -> list[dict[str, Any]]:
    """The held-out rows, the same for every model."""
    dataset = load_sft_dataset(str(grid.output_path / "data" / "heldout.jsonl"))
    assert isinstance(dataset, Dataset)
    return list(dataset.select(range(grid.num_heldout)))


def check_same(now: Mapping[str, Any], stored: Mapping[str, Any], what: str, remedy: str) -> None:
    """Compares what something was made with and what the settings say now.

    The content of data is compared where both know it: earlier versions did not, and the data may be gone by now.

    Args:
        now: The settings now.
        stored: Those that it was made with.
        what: What was made.
        remedy: What else than another `output_dir` helps.

    Raises:
        ValueError: At the first difference; names the setting and both values.
    """
    if (difference := _difference(now, stored)) is not None:
        name, before, after = difference
        raise ValueError(
            f"{what}: made with {name}={before!r}, and now {name} is {after!r}; set another output_dir, or "
            f"{remedy} to train anew."
        )


def _difference(now: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs, with its value then and now."""
    for name in (*now, *stored):
        before, after = (values.get(name, "not set") for values in (stored, now))
        is_unknown = name.startswith(CONTENT) and "not set" in (before, after)
        if before != after and not is_unknown:
            return name, before, after
    return None


def _contents(grid: Grid, *names: str) -> dict[str, str]:
    """A digest of the files behind each of these settings that names some here; data of the hub have none."""
    sources = {name: getattr(grid, name) for name in names}
    paths = {name: Path(source).expanduser() for name, source in sources.items() if source is not None}
    return {f"{CONTENT}{name}": _digest(path) for name, path in paths.items() if path.exists()}


def _digest(path: Path) -> str:
    """A digest of a file, or of all files of data in a folder."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.suffix in BUILDERS)
    for each in files:
        digest.update(each.name.encode())
        with each.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def _check_sources(grid: Grid) -> None:
    """Raises if a file that is written is one that is read, or would be among those of a folder that is read."""
    data = grid.output_path / "data"
    targets = [data / f"{name}.jsonl" for name in ("train", "heldout", "replay")]
    targets += [run_folder(grid, run) / "train.jsonl" for run in grid.runs() if run.replay_share]
    for name in ("train_dataset", "heldout_dataset", "replay_dataset"):
        source = Path(getattr(grid, name) or "").expanduser()
        if getattr(grid, name) is None or not source.exists():
            continue
        for target in targets:
            is_within = source.is_dir() and target.resolve().is_relative_to(source.resolve())
            if is_within or (target.exists() and target.samefile(source)):
                raise ValueError(
                    f"output_dir={grid.output_dir!r}: {target} would be written in the place of "
                    f"{name}={str(source)!r}, or into it; set another output_dir."
                )


def _read_own(record: Path, name: str, remedy: str) -> dict[str, Any] | None:
    """Reads a record of what data were made with, which has a setting of that name; `None` where there is none."""
    if not record.is_file():
        return None
    stored = read_record(record, remedy)
    if name not in stored and stored != BEGUN:
        raise ValueError(f"{record} is no record of lopt-hf compare, and would be lost; set another output_dir.")
    return stored


def _check_free(record: Path, *names: str) -> None:
    """Raises if a file is there, where no record says that it is ours."""
    for target in (record.with_name(name) for name in names):
        if target.exists():
            raise ValueError(
                f"{target} is there, and no {record.name} beside it says that lopt-hf compare wrote it; set another "
                "output_dir, or delete the file if it is of an earlier comparison."
            )


def _prepare_replay(grid: Grid) -> None:
    """Writes `data/replay.jsonl`, if a method asks for general text; its settings are kept apart, as not all do."""
    runs = [run for run in grid.runs() if run.replay_share]
    if not runs:
        return
    target, record = (grid.output_path / "data" / name for name in ("replay.jsonl", "replay.json"))
    settings = {
        "replay_dataset": grid.replay_dataset,
        "replay_split": grid.replay_split,
        "training.max_length": grid.training["max_length"],
        "model": grid.model,
        **_contents(grid, "replay_dataset"),
    }
    remedy = f"delete it and {target.name} beside it, and the rows are chosen again"
    stored = _read_own(record, "replay_dataset", remedy)
    if stored is not None and any(model_folder(grid, run).is_dir() for run in runs):
        check_same(settings, stored, f"the general text of the runs in {grid.output_path}", "delete these runs")
    if stored is None or _difference(settings, stored) is not None or not target.is_file():
        if stored is None:
            _check_free(record, target.name)
        _prepare(grid, "replay", general_rows(grid), target, record)
        write_text(record, json.dumps(settings, indent=2))
    most = max(runs, key=lambda run: run.num_replayed)
    what = f"replay_share={most.replay_share} asks for {most.num_replayed} rows of general text"
    _check_count(grid, what, most.num_replayed, target, grid.replay_dataset or "Python's prose")


def _check_count(grid: Grid, what: str, count: int, target: Path, source: str) -> None:
    """Raises if fewer rows fit than are asked for."""
    with target.open(encoding="utf-8") as rows:
        fitting = sum(1 for _ in rows)
    if fitting < count:
        raise ValueError(
            f"{what}, but only {fitting} rows of {source} fit in max_length={grid.training['max_length']}; lower the "
            "one or raise the other."
        )


def _prepare(grid: Grid, name: str, dataset: Dataset | IterableDataset, target: Path, record: Path | None) -> None:
    """Writes the rows of one data set that fit.

    Args:
        grid: The settings.
        name: Of the setting, without its end.
        dataset: The rows.
        target: The file.
        record: What says first that the file is ours: what a kill leaves half prepared is then prepared again. `None`
            for one that keeps what it says.
    """
    max_length = int(grid.training["max_length"])
    columns = set(dataset.column_names or ())
    if not {"prompt", "completion"} <= columns or isinstance(next(iter(dataset))["prompt"], str):
        raise ValueError(
            f"{name}_dataset={getattr(grid, f'{name}_dataset')} has the columns {sorted(columns)}; a comparison needs "
            "prompts and completions as messages, so that the loss of an answer can be told; give it those, or one of "
            "the question-and-answer layouts of lopt-hf sft."
        )
    ModelReference.find(grid.model)  # says what is wrong with it
    fitting = dataset.select_columns(["prompt", "completion"]).filter(
        _fits,
        fn_kwargs={"tokenizer": AutoTokenizer.from_pretrained(resolve_model(grid.model)), "max_length": max_length},
        desc=f"{name}: rows within {max_length} tokens",
    )
    assert isinstance(fitting, Dataset) and isinstance(dataset, Dataset)
    if len(fitting) < len(dataset):
        logger.warning(
            "%s_dataset: %d of %d rows are longer than max_length=%d tokens and are left out.",
            *(name, len(dataset) - len(fitting), len(dataset), max_length),
        )
    if record is not None:
        write_text(record, json.dumps(BEGUN))
    with atomic_file(target) as partial:
        fitting.to_json(partial)


def _fits(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int) -> bool:
    text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"]) <= max_length
