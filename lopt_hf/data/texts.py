"""Plain text: a file, a split of the hub, or prose that every Python carries."""

from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from lopt_hf.common.evaluation import general_text
from lopt_hf.data.loading import NoHubError, load_sft_dataset
from lopt_hf.data.mirror import find_in_mirror, given_data_dir, say_copy, say_once

__all__ = ["is_text", "prose", "read_text"]


def is_text(name: str) -> bool:
    """Tells whether a name is one of text: a `.txt` file, or `id:configuration:split` of the hub."""
    return name.endswith(".txt") or name.count(":") == 2


def prose(half: Literal["first", "second"]) -> str:
    """Returns a half of the prose that every Python carries."""
    text = general_text()
    middle = len(text) // 2
    return text[:middle] if half == "first" else text[middle:]


def read_text(
    name: str, setting: str, data_dir: str | None = None, fallback: Literal["first", "second"] | None = "first"
) -> str:
    """Reads text.

    Args:
        name: A file, or `id:configuration:split` of a data set of the hub with a column `text`. Between its documents
            is a blank line, but where one ends with a newline: those of WikiText are lines.
        setting: What it is for, for messages.
        data_dir: Folder with copies of the hub's data sets.
        fallback: The half of Python's prose to take where no hub answers; one line says so. `None`: none.

    Raises:
        ValueError: If there is no such text, or if it is no UTF-8.
        FileNotFoundError: If the hub does not have it; a `NoHubError` if no hub answers and there is no `fallback`.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _read_file(path, f"{setting}={name!r}")
    if name.count(":") != 2:
        raise ValueError(
            f"{setting}={name!r} is no file here; give the path of a text file, or id:configuration:split of the hub."
        )
    hub_id, config, split = name.split(":")
    folder = given_data_dir(data_dir)
    copy = None if folder is None else find_in_mirror(folder, hub_id, config, split, [".txt"])
    if copy is not None and copy.path.is_file():
        say_copy(hub_id, split, copy)
        return _read_file(copy.path, f"{setting}={name!r}")
    try:
        rows: Any = load_sft_dataset(hub_id, config, split, data_dir=data_dir)
    except NoHubError as error:
        if fallback is None:
            raise NoHubError(f"{setting}={name!r}: {error}") from error
        say_once(
            f"Data: no hub answers for {hub_id}; {setting} is the {fallback} half of the prose that every Python has."
        )
        return prose(fallback)
    assert isinstance(rows, Dataset)
    if "text" not in rows.column_names:
        raise ValueError(f"{setting}={name!r} has the columns {rows.column_names} and no text; name other data.")
    *others, last = [text for text in rows["text"] if text] or [""]
    return "".join(text if text.endswith("\n") else f"{text}\n\n" for text in others) + last


def _read_file(path: Path, given: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(
            f"{given}: byte {error.start + 1} ({byte:#04x}) of {path} is no UTF-8; save the file as UTF-8."
        ) from error
