"""The images that a command trains on and measures, loaded and checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from datasets import Dataset

from lopt_hf.data.images import ImageRows, check_labels, class_names, find_columns
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
    """

    train: Dataset
    evaluated: Dataset | None
    columns: tuple[str, str]
    names: list[str]
    numbers: Sequence[int] | None

    def check(self) -> None:
        """Reads every image once, where they are few enough, and says how many get converted.

        Raises:
            RowError: If one cannot be read, or a label is not one of the classes.
        """
        for rows in (self.train, self.evaluated):
            if rows is not None:
                images = ImageRows(rows, len(self.names), None, 0, *self.columns)
                self.check_rows(images, is_training=rows is self.train)

    def check_rows(self, images: Any, is_training: bool) -> None:
        """The same for what a trainer has made of one of the two.

        Args:
            images: The rows; of another kind, such as a user's own, nothing is checked.
            is_training: Whether they are those of `train`.
        """
        if not isinstance(images, ImageRows):
            return
        if is_training and self.numbers is not None:
            images.numbers = self.numbers
        if len(images) <= CHECKED_IMAGES:
            images.check_images()


def load_images(script_args: Any, seed: int) -> LabelledImages:
    """Loads what a command's data options name.

    Args:
        script_args: `ImageScriptArguments`.
        seed: What a part of the training images is drawn with.

    Raises:
        ValueError: If a column is missing, or a label is no class; names the row.
        FileNotFoundError: If there are no such data.
    """
    whole = cast(Dataset, _load(script_args, "train", seed))
    evaluated = _load(script_args, "eval", seed)
    columns = find_columns(whole, script_args.image_column, script_args.label_column)
    names = class_names(whole, columns[1])  # a part may lack the highest label
    check_labels(whole, columns[1], len(names))
    drawn = script_args.dataset_max_samples
    numbers = None
    if drawn is not None:
        rows = Dataset.from_dict({"row": list(range(1, len(whole) + 1))})
        numbers = subsample(rows, drawn, seed)["row"][:]
    return LabelledImages(cast(Dataset, subsample(whole, drawn, seed)), evaluated, columns, names, numbers)


def _load(script_args: Any, part: str, seed: int) -> Any:
    if part == "train":
        return load_checked(_rows, script_args, script_args.dataset_train_split, seed)
    if script_args.eval_file is not None:
        name, script_args.dataset_name = script_args.dataset_name, script_args.eval_file
        try:
            return load_checked(_rows, script_args, "train", seed)  # of a file the only split
        finally:
            script_args.dataset_name = name
    if script_args.train_file is not None:
        return None
    return load_checked(_rows, script_args, script_args.dataset_test_split, seed)


def _rows(script_args: Any, split: str, seed: int) -> Any:
    return load_rows(script_args, split, seed, {})
