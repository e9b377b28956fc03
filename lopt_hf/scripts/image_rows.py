"""The images that a command trains on and measures, loaded and checked."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from datasets import ClassLabel, Dataset

from lopt_hf.data.images import ImageRows, check_labels, class_names, find_columns
from lopt_hf.data.rows import RowError
from lopt_hf.scripts.training import load_checked, load_rows, subsample

__all__ = ["LabelledImages", "load_images"]

# Ours: so many images are read once before training, so that a broken one is named then and not in the last epoch
CHECKED_IMAGES = 50_000


@dataclass(frozen=True)
class LabelledImages:
    """What a command's data options name.

    Attributes:
        train: The images to train on.
        evaluated: Those that accuracy is measured on, if there are any.
        columns: The columns of images and of labels.
        names: The classes.
        numbers: Of the rows of `train` in the data, from 1, where they are a drawn part.
        sources: What names the data of `train` and of `evaluated` in an error.
    """

    train: Dataset
    evaluated: Dataset | None
    columns: tuple[str, str]
    names: list[str]
    numbers: Sequence[int] | None
    sources: tuple[str, str]

    def check(self, shows_progress: bool = False) -> None:
        """Reads every image once, where they are few enough, and says how many get converted.

        Args:
            shows_progress: Whether a bar shows how many have been read.

        Raises:
            RowError: If one cannot be read, or a label is not one of the classes.
        """
        for rows in (self.train, self.evaluated):
            if rows is not None:
                images = ImageRows(rows, len(self.names), None, 0, *self.columns)
                self.check_rows(images, is_training=rows is self.train, shows_progress=shows_progress)

    def check_rows(self, images: Any, is_training: bool, shows_progress: bool = False) -> None:
        """The same for what a trainer has made of one of the two.

        Args:
            images: The rows; of another kind, such as a user's own, nothing is checked.
            is_training: Whether they are those of `train`.
            shows_progress: Whether a bar shows how many have been read.
        """
        if not isinstance(images, ImageRows):
            return
        images.source = self.sources[0 if is_training else 1]
        if is_training and self.numbers is not None:
            images.numbers = self.numbers
        if len(images) <= CHECKED_IMAGES:
            images.check_images(shows_progress)


def load_images(script_args: Any, seed: int) -> LabelledImages:
    """Loads what a command's data options name.

    Args:
        script_args: `ImageScriptArguments`.
        seed: What a part of the training images is drawn with.

    Raises:
        ValueError: If a column is missing, or a label is no class; names the row.
        FileNotFoundError: If there are no such data.
    """
    if script_args.dataset_name is None:
        raise ValueError(
            "train_file is missing; give a .parquet, .json or .jsonl file or a folder, or dataset_name with a hub id."
        )
    whole = cast(Dataset, _load(script_args, "train", seed))
    evaluated = _load(script_args, "eval", seed)
    sources = _sources(script_args)
    with _naming(sources[0]):
        columns = find_columns(whole, script_args.image_column, script_args.label_column)
        names = class_names(whole, columns[1])  # a part may lack the highest label
        check_labels(whole, columns[1], len(names))
    if evaluated is not None:
        with _naming(sources[1]):
            _check_classes(whole, evaluated, columns[1])
            ImageRows(evaluated, len(names), None, seed, *columns)  # finds what is wrong with it
    drawn = script_args.dataset_max_samples
    numbers = None
    if drawn is not None:
        rows = Dataset.from_dict({"row": list(range(1, len(whole) + 1))})
        numbers = subsample(rows, drawn, seed)["row"][:]
    return LabelledImages(cast(Dataset, subsample(whole, drawn, seed)), evaluated, columns, names, numbers, sources)


def _check_classes(trained: Dataset, evaluated: Dataset, label_column: str) -> None:
    """Raises if the same number is another class in the images to evaluate on."""
    ours, theirs = (rows.features.get(label_column) for rows in (trained, evaluated))
    if not isinstance(ours, ClassLabel) or not isinstance(theirs, ClassLabel):
        return
    for number, (name, other) in enumerate(zip(ours.names, theirs.names, strict=False)):
        if name != other:
            raise ValueError(
                f"label {number} is {other!r} here and {name!r} among the training images; give both the same classes "
                "in the same order."
            )


def _sources(script_args: Any) -> tuple[str, str]:
    """What names the images to train on and those that accuracy is measured on in an error."""
    named = (
        ("train_file", script_args.train_file, script_args.dataset_train_split),
        ("eval_file", script_args.eval_file, script_args.dataset_test_split),
    )
    train, evaluated = (
        f"dataset_name={script_args.dataset_name}, split {split!r}" if file is None else f"{name}={file}"
        for name, file, split in named
    )
    return train, evaluated


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Lets an error of data say where they are from."""
    try:
        yield
    except RowError as error:
        raise RowError(f"{source}, {error}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _load(script_args: Any, part: str, seed: int) -> Any:
    if part == "train":
        return load_checked(_rows, script_args, script_args.dataset_train_split, seed)
    if script_args.eval_file is not None:
        name, script_args.dataset_name = script_args.dataset_name, script_args.eval_file
        try:
            return load_checked(_rows, script_args, "train", seed)  # of a file the only split
        finally:
            script_args.dataset_name = name
    if Path(script_args.dataset_name).is_file():  # which has one split
        return None
    return load_checked(_rows, script_args, script_args.dataset_test_split, seed)


def _rows(script_args: Any, split: str, seed: int) -> Any:
    return load_rows(script_args, split, seed, {})
