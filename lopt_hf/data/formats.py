"""Loading supervised data sets, and bringing them into a layout that TRL's `SFTTrainer` reads."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from datasets import Dataset, IterableDataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

__all__ = ["load_sft_dataset", "to_trl_format"]

DatasetT = TypeVar("DatasetT", Dataset, IterableDataset)
Row = Mapping[str, Any]

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}

# What TRL reads as it is, in order of preference where a data set has several
TRL_LAYOUTS = (("input_ids",), ("prompt", "completion"), ("messages",))

# Every column that makes TRL decide for a layout; those of a layout not chosen have to go
LAYOUT_COLUMNS = frozenset({"prompt", "completion", "messages", "conversations", "chosen", "rejected"})

# (question, answer), and the column with more input for the question, which may be missing or empty
PAIR_LAYOUTS: dict[tuple[str, str], str | None] = {
    ("instruction", "output"): "input",  # Alpaca
    ("instruction", "response"): "context",  # Magpie, without the context; Dolly, with it
    ("query", "response"): None,  # MetaMathQA
    ("question", "answer"): None,  # GSM8K
    ("problem", "solution"): None,  # MATH
}

SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


def load_sft_dataset(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Load one split of a data set from a file, a folder or the hub.

    Args:
        name (`str`):
            A `.json`, `.jsonl` or `.parquet` file, a folder of such files, or a hub id. What exists locally wins.
        config (`str`, *optional*):
            The data set's configuration, for hub ids that have several.
        split (`str`, *optional*, defaults to `"train"`):
            The split's name. A single file has the split `"train"` only; in a folder, files called `test.jsonl` and
            the like make further splits. Slices such as `"train[:100]"` work unless `streaming`.
        streaming (`bool`, *optional*, defaults to `False`):
            Read rows as they are needed instead of preparing the whole split on disk first.

    Returns:
        `Dataset` or `IterableDataset`: The latter if `streaming`.

    Raises:
        FileNotFoundError: `name` is no file or folder here, nor a data set the hub gives access to.
        ValueError: The file type is not supported, there is no data in it, or `split` or `config` does not exist.
    """
    path = Path(name).expanduser()
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
        return load_dataset(**arguments, split=split, streaming=streaming)
    except (ConnectionError, DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{name!r} is neither a file or folder here nor a data set the hub gives access to. Give the path of a "
            f"{', '.join(BUILDERS)} file or a folder of them, or check the id, the network and `hf auth login`."
        ) from error
    except ValueError as error:  # an unknown split or config; the original message names those there are
        raise ValueError(f"Could not load split {split!r} of {name!r} (config {config!r}): {error}") from error


def _builder(path: Path) -> str:
    if path.suffix not in BUILDERS:
        raise ValueError(f"{path} has the unsupported suffix {path.suffix!r}. Supported are {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty. Give a file with at least one row.")
    return BUILDERS[path.suffix]


def _check_folder(path: Path) -> None:
    if not any(file.suffix in BUILDERS for file in path.rglob("*")):
        raise ValueError(f"The folder {path} holds no {', '.join(BUILDERS)} file. Convert the data to one of these.")


def to_trl_format(dataset: DatasetT) -> DatasetT:
    """Bring a data set into a layout that TRL's `SFTTrainer` reads, judging by its columns.

    TRL's own layouts (`input_ids`; `prompt` and `completion`; `messages`; `text`) are left as they are, except that
    columns which would make TRL see another layout are dropped: `SFTTrainer` fails on a `prompt` beside `messages`.

    Pairs of columns become `prompt` and `completion`, and all other columns are dropped: Alpaca
    (`instruction`, `input`, `output`), Magpie and Dolly (`instruction`, `context`, `response`), MetaMathQA
    (`query`, `response`), GSM8K (`question`, `answer`) and MATH (`problem`, `solution`). Both sides are
    conversational, one user and one assistant message: so the model's own chat template is used rather than Alpaca's
    "### Instruction" headers, which chat models were not trained on, and TRL takes the loss on the answer only. An
    input follows its instruction after a blank line. A pair wins over a `text` or `conversations` beside it, which in
    Stanford Alpaca and Magpie repeats it.

    ShareGPT's `conversations` become `messages`: TRL renames their keys, but keeps the roles "human" and "gpt", which
    no chat template knows, and does not read `conversations` whose keys are `role` and `content` already.

    Args:
        dataset (`Dataset` or `IterableDataset`):
            The data. Only the first row is looked at to find the layout.

    Returns:
        The same kind of data set; the same object if there is nothing to change.

    Raises:
        ValueError: The data set is empty, is in no known layout, or its pair of columns does not hold text.
    """
    first_row = next(iter(dataset), None)
    if first_row is None:
        raise ValueError("The data set is empty. Check the split and any filter applied to it.")
    columns = list(first_row)  # of a stream, `column_names` may be unknown
    for layout in TRL_LAYOUTS:
        if first_row.keys() >= set(layout):
            return _drop(dataset, [name for name in columns if name in LAYOUT_COLUMNS.difference(layout)])
    for (question, answer), more_input in PAIR_LAYOUTS.items():
        if first_row.keys() >= {question, answer}:
            _check_text(first_row, question, answer)
            return dataset.map(_pair_converter(question, answer, more_input), remove_columns=columns)
    if "conversations" in first_row:
        return dataset.map(_sharegpt_to_messages, remove_columns=[name for name in columns if name in LAYOUT_COLUMNS])
    if "text" in first_row:
        return _drop(dataset, [name for name in columns if name in LAYOUT_COLUMNS])
    raise ValueError(
        f"The data set's columns {columns} are in no layout known here. Rename them to one of: {_accepted_layouts()}."
    )


def _drop(dataset: DatasetT, columns: list[str]) -> DatasetT:
    return dataset.remove_columns(columns) if columns else dataset


def _check_text(row: Row, *columns: str) -> None:
    for column in columns:
        if not isinstance(row[column], str):
            raise ValueError(
                f"The column {column!r} holds {type(row[column]).__name__}, not text, so it can't be trained on as a "
                "question or an answer. Map the data to `prompt` and `completion` first."
            )


def _pair_converter(question: str, answer: str, more_input: str | None) -> Callable[[Row], dict[str, Any]]:
    def convert(row: Row) -> dict[str, Any]:
        extra = (row.get(more_input) or "").strip() if more_input else ""
        content = f"{row[question]}\n\n{extra}" if extra else row[question]
        return {
            "prompt": [{"role": "user", "content": content}],
            "completion": [{"role": "assistant", "content": row[answer]}],
        }

    return convert


def _sharegpt_to_messages(row: Row) -> dict[str, Any]:
    messages = []
    for turn in row["conversations"]:
        role, content = (turn["from"], turn["value"]) if "from" in turn else (turn["role"], turn["content"])
        messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
    return {"messages": messages}


def _accepted_layouts() -> str:
    pairs = [f"{question}, [{extra}], {answer}" if extra else f"{question}, {answer}"
             for (question, answer), extra in PAIR_LAYOUTS.items()]  # fmt: skip
    return "; ".join([", ".join(layout) for layout in TRL_LAYOUTS] + pairs + ["conversations", "text"])
