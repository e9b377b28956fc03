"""Labelled images from a data set: decoded and checked row by row, augmented, and made into batches.

Row numbers count from 1, as everywhere where data are named in an error.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from datasets import Value as ValueType
from PIL import Image as Pillow
from PIL import UnidentifiedImageError
from tqdm.auto import tqdm

from lopt_hf.common.settings import check_choice, suggest
from lopt_hf.data.rows import RowError, show

__all__ = [
    "AUGMENTATIONS",
    "ImageBatches",
    "ImageRows",
    "check_labels",
    "class_names",
    "find_columns",
    "make_augmentation",
]

logger = logging.getLogger(__name__)

IMAGE_COLUMNS = ("image", "img", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label")
AUGMENTATIONS = ("crop-flip", "resized-crop", "none")
_DECODER = Image()
UNBOUNDED_MODES = ("I", "F")  # of 32-bit integers and floats
PADDING_SHARE = 8  # ours: 4 pixels of CIFAR's 32, as in the papers

Augmentation = Callable[[torch.Tensor], torch.Tensor]


def find_columns(
    dataset: Dataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Finds the columns of images and labels.

    Args:
        dataset: The data.
        image_column: The one of images, where it is not called as usual.
        label_column: The one of labels, likewise.

    Raises:
        ValueError: If there is none.
    """
    found = []
    for name, given, usual in (("image", image_column, IMAGE_COLUMNS), ("label", label_column, LABEL_COLUMNS)):
        candidates = usual if given is None else (given,)
        column = next((column for column in candidates if column in dataset.column_names), None)
        if column is None:
            raise ValueError(
                f"{name}_column={given or usual[0]!r} is none of the data's columns "
                f"({suggest(given or usual[0], dataset.column_names)}); set {name}_column."
            )
        found.append(column)
    return found[0], found[1]


def class_names(dataset: Dataset, label_column: str) -> list[str]:
    """The names of the classes; where the data have none, the numbers from 0 to the highest.

    Raises:
        RowError: If a label is no whole number from 0 on.
        ValueError: If there is one class, or none.
    """
    feature = dataset.features[label_column]
    if isinstance(feature, ClassLabel):
        names = list(feature.names)
    else:
        check_labels(dataset, label_column, None)
        names = [str(number) for number in range(max(dataset.with_format(None)[label_column], default=-1) + 1)]
    if len(names) < 2:
        raise ValueError(f"label_column={label_column!r} has {len(names)} class; classification needs two or more.")
    return names


def check_labels(dataset: Dataset, label_column: str, num_labels: int | None) -> None:
    """Checks that every label is one of a model's.

    Args:
        dataset: The data.
        label_column: The column.
        num_labels: How many the model has; `None`: any.

    Raises:
        RowError: If one is not; names row and value.
    """
    highest = "" if num_labels is None else f" to {num_labels - 1}, as the model has num_labels={num_labels}"
    for number, label in enumerate(dataset.with_format(None)[label_column], start=1):
        if not isinstance(label, int) or label < 0 or (num_labels is not None and label >= num_labels):
            raise RowError(
                f"row {number}: {label_column!r} is {show(label)}, but a label is a whole number from 0{highest}; "
                "correct or remove the row."
            )


def make_augmentation(name: str, size: tuple[int, int] | None) -> Augmentation | None:
    """Makes the random change of each training image, by torchvision's transforms.

    Args:
        name: `"crop-flip"`: padded by an eighth, cropped to its size anew, and flipped at a chance of a half (as the
            papers do with CIFAR); `"resized-crop"`: a random part, resized, and flipped (as they do with ImageNet);
            `"none"`.
        size: Height and width of a resized crop, in pixels; `None`: the image's own.

    Raises:
        ValueError: If the name is unknown.
        ImportError: If torchvision is missing.
    """
    check_choice("augmentation", name, AUGMENTATIONS)
    if name == "none":
        return None
    import torchvision  # an extra of the package  # noqa: F401

    return _crop_flip if name == "crop-flip" else partial(_resized_crop, size=size)


def _crop_flip(image: torch.Tensor) -> torch.Tensor:
    return _crop_flip_of(*image.shape[-2:])(image)


def _resized_crop(image: torch.Tensor, size: tuple[int, int] | None) -> torch.Tensor:
    return _resized_crop_of(*(size or image.shape[-2:]))(image)


@lru_cache(maxsize=64)
def _crop_flip_of(height: int, width: int) -> Augmentation:
    from torchvision.transforms import v2

    padding = [max(1, width // PADDING_SHARE), max(1, height // PADDING_SHARE)]
    return v2.Compose([v2.RandomCrop((height, width), padding=padding), v2.RandomHorizontalFlip()])


@lru_cache(maxsize=64)
def _resized_crop_of(height: int, width: int) -> Augmentation:
    from torchvision.transforms import v2

    return v2.Compose([v2.RandomResizedCrop((height, width), antialias=True), v2.RandomHorizontalFlip()])


class ImageRows(torch.utils.data.Dataset):
    """Rows of images and labels as tensors, for a trainer.

    What is drawn for a row follows from the seed, the epoch and the row's number, so that a run that is resumed, and
    one with several loading processes, sees the same images.

    Args:
        dataset: A data set with a column of images and one of labels.
        num_labels: The model's classes.
        augmentation: The random change of each image, of a tensor (3, height, width) of bytes; `None`: none.
        seed: What it is drawn from.
        image_column: The column of images, where it is not called as usual.
        label_column: The one of labels, likewise.

    Attributes:
        source: Where the rows are from, for messages, such as `"eval_file=test.parquet"`; `None`: not said.

    Raises:
        RowError: If a label is not one of the model's, or an image cannot be read; names the row.
        ValueError: If a column is missing or there is no row.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_labels: int,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> None:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"The images are a {type(dataset).__name__}, but have to be a `datasets.Dataset`, with rows that can "
                "be looked up; load them without streaming, and name the split."
            )
        if len(dataset) == 0:
            raise ValueError("The data set is empty. Check the split and any filter applied to it.")
        self.image_column, self.label_column = find_columns(dataset, image_column, label_column)
        kind = dataset.features[self.image_column]
        if not isinstance(kind, Image) and not (isinstance(kind, ValueType) and kind.dtype in ("string", "binary")):
            raise ValueError(f"image_column={self.image_column!r} holds no images, but {kind}; name another column.")
        check_labels(dataset, self.label_column, num_labels)
        rows = dataset.with_format(None).cast_column(self.image_column, Image(decode=False))
        self.images = rows.select_columns([self.image_column])
        self.labels: list[int] = rows[self.label_column][:]
        self.augmentation = augmentation
        self.seed = seed
        self.source: str | None = None
        self.numbers: Sequence[int] = range(1, len(rows) + 1)  # of the rows, for messages; a drawn part sets others
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()  # processes that stay over epochs see it too

    def set_epoch(self, epoch: int) -> None:
        """Says which epoch begins."""
        self._epoch.fill_(epoch)

    def check_images(self, shows_progress: bool = False) -> None:
        """Reads every image once, and says how many are no colour images and get converted.

        Args:
            shows_progress: Whether a bar shows how many have been read.

        Raises:
            RowError: If one cannot be read.
        """
        rows = tqdm(range(len(self)), desc="checking images", unit="image", disable=not shows_progress)
        modes = Counter(self._decode(index).mode for index in rows)
        others = {mode: number for mode, number in modes.items() if mode != "RGB"}
        if others:
            kinds = ", ".join(f"{number} of mode {mode}" for mode, number in sorted(others.items()))
            logger.warning(
                "%d of %d images are not RGB (%s) and are converted to it.", sum(others.values()), len(self), kinds
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = _to_tensor(_as_rgb(self._decode(index)))
        if self.augmentation is not None:
            with torch.random.fork_rng(devices=[]):
                drawn_from = np.random.SeedSequence((self.seed, int(self._epoch), index)).generate_state(1)[0]
                torch.default_generator.manual_seed(int(drawn_from))
                image = self.augmentation(image)
        return {"image": image, "labels": self.labels[index]}

    def _decode(self, index: int) -> Pillow.Image:
        cell = self.images[index][self.image_column]
        source = "" if self.source is None else f"{self.source}, "
        where = f"{source}row {self.numbers[index]}: {self.image_column!r}"
        if cell is None or not (cell.get("bytes") or cell.get("path")):
            raise RowError(f"{where} is empty; give it an image, or remove the row.")
        try:
            # As `datasets` decodes it: turned as a camera notes it in EXIF, also from within an archive
            image: Pillow.Image = _DECODER.decode_example(
                {"path": cell.get("path"), "bytes": cell.get("bytes") or None}
            )
        except Pillow.DecompressionBombError as error:
            raise RowError(f"{where} cannot be read ({error}); replace or remove the row.") from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            reason = str(error) if cell.get("path") and not cell.get("bytes") else "it is no image, or is cut off"
            raise RowError(f"{where} cannot be read ({reason}); replace or remove the row.") from error
        if image.mode in UNBOUNDED_MODES:
            raise RowError(
                f"{where} has the mode {image.mode!r}, whose numbers have no range that says what is white; save it "
                "with 8 or 16 bits for each pixel, or remove the row."
            )
        return image


def _as_rgb(image: Pillow.Image) -> Pillow.Image:
    """Converts to RGB; of 16 bits the upper eight are kept, where Pillow would cut everything above 255."""
    if image.mode.startswith("I;16"):
        image = Pillow.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _to_tensor(image: Pillow.Image) -> torch.Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).contiguous()


class ImageBatches:
    """Makes a batch of rows: resized and normalised by a model's image processor.

    Args:
        processor: The image processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        pixels = self.processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
        return {"pixel_values": pixels, "labels": torch.tensor([row["labels"] for row in rows])}
