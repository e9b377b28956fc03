"""Copies of a hub's data sets in a local folder, for machines that reach no hub."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from lopt_hf.data.damage import BUILDERS

__all__ = ["DATA_DIR_HELP", "find_in_mirror", "given_data_dir", "say_once"]

logger = logging.getLogger(__name__)

VARIABLE = "LOPT_HF_DATA_DIR"
DATA_DIR_HELP = f"Folder with copies of data sets, looked into before the hub. Default: what {VARIABLE} names, if set."


def given_data_dir(data_dir: str | Path | None) -> Path | None:
    """Returns the folder of local copies, as given or as `LOPT_HF_DATA_DIR` names it; `None` without either.

    Args:
        data_dir: As given.

    Raises:
        ValueError: If there is no such folder.
    """
    given = data_dir or os.environ.get(VARIABLE)
    if not given:
        return None
    folder = Path(given).expanduser()
    if not folder.is_dir():
        name = "data_dir" if data_dir else VARIABLE
        raise ValueError(f"{name}={str(given)!r} is no folder; name the one with the copies of the data sets.")
    return folder


def find_in_mirror(
    folder: Path, name: str, config: str | None, split: str, suffixes: Iterable[str] = BUILDERS
) -> tuple[Path, str] | None:
    """Finds the copy of a hub's data set.

    Args:
        folder: Where copies are. That of `openai/gsm8k` is a folder `openai/gsm8k` or `gsm8k`, as `load_dataset` takes
            it, or a file for each split such as `gsm8k_train.jsonl`.
        name: The hub id.
        config: The data set's configuration; files may be called by it in place of the name.
        split: The split, which may be a slice such as `train[:100]`.
        suffixes: Those that a file may have.

    Returns:
        The file or folder, and the split to ask it for; `None` if there is no copy.
    """
    last = name.rpartition("/")[2]
    for place in (folder / name, folder / last):
        if place.is_dir():
            return place, split
    split_name, bracket, rest = split.partition("[")
    stems = [last] if config is None else [last, f"{last}_{config}", config]
    for stem in stems:
        for suffix in suffixes:
            path = folder / f"{stem}_{split_name}{suffix}"
            if path.is_file():
                return path, f"train{bracket}{rest}"  # a single file has no other split
    return None


def say_once(message: str) -> None:
    """Says where data come from; of several processes that were launched together only the first does."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)
