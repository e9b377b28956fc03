"""Loading data sets from files, folders and the hub; a damaged file is named with the line and the cause."""

from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, IterableDataset, get_dataset_config_names, load_dataset, load_dataset_builder
from datasets.data_files import FILES_TO_IGNORE
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from lopt_hf.data.damage import BUILDERS, find_damage
from lopt_hf.data.mirror import Copy, find_in_mirror, given_data_dir, say_copy
from lopt_hf.data.rows import RowError

__all__ = ["READ_ERRORS", "NoHubError", "SplitError", "explain_damage", "load_sft_dataset"]

# What reading a damaged file raises, at once or, of a stream, at its row
READ_ERRORS = (DatasetGenerationError, UnicodeDecodeError, pyarrow.ArrowException, RowError)

_SPLIT_ERRORS = ("Unknown split", "Bad split")  # how datasets 5 begins to say so, also of a stream


class NoHubError(FileNotFoundError):
    """Data are to come from the hub, and no hub answers."""


class SplitError(ValueError):
    """Data do not have a split."""


class _LeftOutError(ValueError):
    """A folder's data would be read in part."""


def load_sft_dataset(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    data_dir: str | Path | None = None,
) -> Dataset | IterableDataset:
    """Loads one split of a data set from a file, a folder or the hub.

    Args:
        name: A `.json`, `.jsonl` or `.parquet` file, a folder of such files, or a hub id. What exists locally wins.
        config: The data set's configuration, for hub ids that have several.
        split: The split's name. A single file has the split `"train"` only; in a folder, files called `test.jsonl` and
            the like make further splits. Slices such as `"train[:100]"` work unless `streaming`.
        streaming: Whether to read rows as they are needed, instead of preparing the whole split on disk first.
        data_dir: Folder with copies of the hub's data sets, which win over the hub, see `find_in_mirror`. Default:
            what `LOPT_HF_DATA_DIR` names.

    Returns:
        An `IterableDataset` if `streaming`, else a `Dataset`.

    Raises:
        FileNotFoundError: If `name` is no file or folder here, nor a data set the hub gives access to; a `NoHubError`
            if no hub answers.
        ValueError: If the file type is not supported, there is no data in it, it is damaged, `split` (a `SplitError`)
            or `config` does not exist or is of a file, a folder has files that are in no split, or `data_dir` is no
            folder.
    """
    path = Path(name).expanduser()
    is_users = path.is_dir()
    if config and path.is_file():
        raise ValueError(f"dataset_config={config!r} has no effect on {name!r}, which is a single file; leave it out.")
    folder = given_data_dir(data_dir)
    if folder is not None and not path.exists() and (copy := find_in_mirror(folder, name, config, split)):
        copy, config = _in_copy(copy, config)
        say_copy(name, split, copy)
        path, split = copy.path, copy.split
        name = str(path)
    if path.is_file():
        arguments: dict[str, Any] = {"path": _builder(path), "data_files": str(path)}
    elif path.is_dir():
        _check_folder(path)
        arguments = {"path": str(path), "name": config}
    elif path.suffix in BUILDERS or name.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"There is no file or folder {name!r} (looked from {Path.cwd()}). Check the path.")
    else:
        arguments = {"path": name, "name": config}
    try:
        if is_users:  # a copy is as the hub has it
            _check_all_in_splits(path, config)
        dataset = load_dataset(**arguments, split=split, streaming=streaming)
        if isinstance(dataset, Dataset) and path.exists():
            dataset.data.validate(full=True)  # text that is no UTF-8 is found by nobody else before it is used
        return dataset
    except (ConnectionError, DatasetNotFoundError) as error:
        kind = NoHubError if isinstance(error, ConnectionError) else FileNotFoundError
        raise kind(
            f"{name!r} is neither a file or folder here nor a data set the hub gives access to. Give the path of a "
            f"{', '.join(BUILDERS)} file or a folder of them, check the id, the network and `hf auth login`, or set "
            "data_dir to a folder with a copy."
        ) from error
    except READ_ERRORS as error:
        raise ValueError(explain_damage(name, error)) from error
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        raise ValueError(
            f"{name!r} comes with a loading script, which is not run ({str(error).splitlines()[0]}); give its data as "
            f"files of the kinds {', '.join(BUILDERS)}."
        ) from error
    except _LeftOutError:
        raise
    except ValueError as error:  # damage too, or an unknown split or config; the message names those there are
        if (damage := find_damage(name)) is not None:
            raise ValueError(damage) from error
        unknown = f"Could not load split {split!r} of {name!r} (config {config!r}): {error}"
        raise (SplitError if str(error).startswith(_SPLIT_ERRORS) else ValueError)(unknown) from error


def _in_copy(copy: Copy, config: str | None) -> tuple[Copy, str | None]:
    """Where in a copy a configuration is, and what to ask for there: a folder of plain files has none by name."""
    if config is None or not copy.path.is_dir():
        return copy, config
    if config in get_dataset_config_names(str(copy.path)):
        return copy._replace(unnamed_config=None), config
    if (copy.path / config).is_dir():
        return copy._replace(path=copy.path / config, unnamed_config=None), None
    return copy, None


def explain_damage(name: str, error: BaseException) -> str:
    """Tells in one line why data could not be read: where a file of them is damaged, its line and the cause.

    Args:
        name: The file, folder or hub id.
        error: What reading it raised.
    """
    cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
    first_line = (str(cause).splitlines() or [type(cause).__name__])[0]
    return find_damage(name) or f"{name!r} could not be read: {first_line}"


def _builder(path: Path) -> str:
    if path.suffix not in BUILDERS:
        raise ValueError(f"{path} has the unsupported suffix {path.suffix!r}. Supported are {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Give a file with at least one row.")
    return BUILDERS[path.suffix]


def _check_folder(path: Path) -> None:
    if not any(file.suffix in BUILDERS for file in path.rglob("*")):
        raise ValueError(f"The folder {path} holds no {', '.join(BUILDERS)} file. Convert the data to one of these.")


def _check_all_in_splits(path: Path, config: str | None) -> None:
    """Checks that every data file of a folder is in one of its splits.

    `datasets` reads one format, and, where a file's name tells a split, such files alone; of the others it says
    nothing. A folder whose README lists its files is as its maker wants it.

    Raises:
        ValueError: If files would not be read; names them.
    """
    readme = path / "README.md"
    if readme.is_file() and "configs:" in readme.read_text(encoding="utf-8", errors="replace"):
        return
    found = load_dataset_builder(str(path), name=config).config.data_files or {}
    read = {Path(file).resolve() for files in found.values() for file in files}
    unread = [file for file in _data_files(path) if file.resolve() not in read]
    if unread and read:
        names = ", ".join(str(file.relative_to(path)) for file in unread[:5])
        more = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        splits = ", ".join(map(str, found))
        raise _LeftOutError(
            f"The folder {path} has files that are in none of its splits ({splits}) and would not be read: "
            f"{names}{more}. Name one file, keep one format, name all files after their splits (train_1.jsonl), or "
            "move these elsewhere."
        )


def _data_files(path: Path) -> list[Path]:
    """The files of a folder that may hold rows; hidden ones do not."""
    files = sorted(file for file in path.rglob("*") if file.suffix in BUILDERS and file.name not in FILES_TO_IGNORE)
    hidden = (".", "__")
    return [file for file in files if not any(part.startswith(hidden) for part in file.relative_to(path).parts)]
