"""Copies of a hub's data sets in a local folder, for machines that reach no hub."""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lopt_hf.data.damage import BUILDERS

__all__ = ["DATA_DIR_HELP", "Copy", "find_in_mirror", "given_data_dir", "say_copy", "say_once"]

logger = logging.getLogger(__name__)

VARIABLE = "LOPT_HF_DATA_DIR"
DATA_DIR_HELP = f"Folder with copies of data sets, looked into before the hub. Default: what {VARIABLE} names, if set."


class Copy(NamedTuple):
    """A copy of a hub's data set.

    Parameters:
        path: The file or folder.
        split: The split to ask it for.
        unnamed_config: The configuration that was asked for, where the copy may be of another one.
    """

    path: Path
    split: str
    unnamed_config: str | None


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
) -> Copy | None:
    """Finds the copy of a hub's data set.

    Args:
        folder: Where copies are. That of `openai/gsm8k` is a folder `openai/gsm8k` or `gsm8k`, as `load_dataset` takes
            it, or a file for each split such as `gsm8k_train.jsonl`.
        name: The hub id.
        config: The data set's configuration; files may be called by it in place of the name, or after it, and win over
            one that is called by the name alone.
        split: The split, which may be a slice such as `train[:100]`.
        suffixes: Those that a file may have.

    Returns:
        The copy, of a folder without a look at the configurations in it; `None` if there is none.
    """
    last = name.rpartition("/")[2]
    for place in (folder / name, folder / last):
        if place.is_dir():
            return Copy(place, split, config)
    split_name, bracket, rest = split.partition("[")
    stems = [last] if config is None else [f"{last}_{config}", config, last]
    for stem in stems:
        for suffix in suffixes:
            path = folder / f"{stem}_{split_name}{suffix}"
            if path.is_file():
                # A single file has no other split
                return Copy(path, f"train{bracket}{rest}", config if stem == last else None)
    return None


def say_copy(name: str, split: str, copy: Copy) -> None:
    """Says which copy of a hub's data set is read, once as `say_once` does."""
    config = copy.unnamed_config
    doubt = "" if config is None else f", taken for the configuration {config!r}, which it does not name"
    say_once(f"Data: {name}, split {split}, from its copy {copy.path}{doubt}.")


def say_once(message: str) -> None:
    """Says where data come from; of several processes that were launched together only the first does."""
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)
