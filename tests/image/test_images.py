"""Images and labels as a user has them: kinds of images, bad rows, and the same draws for a resumed run."""

import io
import pickle

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value
from PIL import Image as Pillow
from transformers import AutoModelForImageClassification, ViTImageProcessor

from lopt_hf import LocalImageConfig, LocalImageTrainer
from lopt_hf.data.images import ImageBatches, ImageRows, class_names, make_augmentation
from lopt_hf.data.rows import RowError
from tests.image.helpers import NUM_LABELS, make_images, make_model, options


def as_bytes(image, kind="PNG"):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_of(cells, labels):
    rows = {"image": [cell and {"bytes": cell, "path": None} for cell in cells], "label": labels}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))


COLOUR = Pillow.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))


def test_a_row_is_the_images_pixels_and_its_label():
    row = ImageRows(data_of([as_bytes(COLOUR)], [1]), num_labels=2)[0]
    assert torch.equal(row["image"], torch.arange(12, dtype=torch.uint8).view(2, 2, 3).permute(2, 0, 1))
    assert row["labels"] == 1


def test_a_photo_is_turned_as_datasets_turns_it():
    exif = Pillow.Exif()
    exif[0x0112] = 6  # the orientation: to be turned by 90 degrees
    file = io.BytesIO()
    Pillow.fromarray(np.arange(18, dtype=np.uint8).reshape(3, 2, 3)).save(file, "PNG", exif=exif)
    data = data_of([file.getvalue()], [0])
    pixels = torch.from_numpy(np.array(data[0]["image"])).permute(2, 0, 1)
    assert pixels.shape == (3, 2, 3)
    assert torch.equal(ImageRows(data, num_labels=2)[0]["image"], pixels)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_kinds_are_converted_and_said_in_one_line(mode, caplog):
    kind = "JPEG" if mode == "CMYK" else "PNG"
    rows = ImageRows(data_of([as_bytes(COLOUR), as_bytes(COLOUR.convert(mode), kind)], [0, 1]), num_labels=2)
    rows.check_images()
    assert rows[1]["image"].shape == (3, 2, 2)
    (line,) = caplog.messages
    assert line == f"1 of 2 images are not RGB (1 of mode {mode}) and are converted to it."


def test_of_sixteen_bits_the_upper_eight_are_kept():
    grey = np.array([[0, 256], [32768, 65535]], dtype=np.uint16)
    row = ImageRows(data_of([as_bytes(Pillow.fromarray(grey))], [0]), num_labels=2)[0]
    assert torch.equal(row["image"], torch.tensor([[0, 1], [128, 255]], dtype=torch.uint8).expand(3, 2, 2))


def test_numbers_without_a_range_and_bombs_are_refused_by_row(monkeypatch):
    tiff = as_bytes(Pillow.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF")
    with pytest.raises(RowError, match="row 2: 'image' has the mode 'F', whose numbers have no range"):
        ImageRows(data_of([as_bytes(COLOUR), tiff], [0, 1]), num_labels=2).check_images()
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(RowError, match="row 1: 'image' cannot be read .Image size .4 pixels. exceeds limit"):
        ImageRows(data_of([as_bytes(COLOUR)], [0]), num_labels=2).check_images()


def test_a_bar_shows_how_many_images_are_read_where_asked_for(capsys):
    rows = ImageRows(data_of([as_bytes(COLOUR)] * 3, [0, 1, 0]), num_labels=2)
    rows.check_images()
    assert capsys.readouterr().err == ""
    rows.check_images(shows_progress=True)
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("checking images: 100%") and "3/3" in last


def test_bad_rows_are_named():
    jpeg = as_bytes(COLOUR.resize((64, 64)), "JPEG")
    for broken in (jpeg[: len(jpeg) // 2], b"no image"):
        rows = ImageRows(data_of([jpeg, broken], [0, 1]), num_labels=2)
        with pytest.raises(RowError, match="row 2: 'image' cannot be read .*; replace or remove the row"):
            rows.check_images()
    with pytest.raises(RowError, match="row 2: 'image' is empty"):
        ImageRows(data_of([jpeg, None], [0, 1]), num_labels=2)[1]
    with pytest.raises(RowError, match="row 3: 'label' is 4, but a label is a whole number from 0 to 3, as the model"):
        ImageRows(data_of([jpeg] * 3, [0, 3, 4]), num_labels=NUM_LABELS)
    with pytest.raises(RowError, match="row 1: 'label' is -1"):
        class_names(data_of([jpeg], [-1]), "label")
    with pytest.raises(RowError, match="row 2: 'label' is None"):
        ImageRows(data_of([jpeg] * 2, [0, None]), num_labels=2)


def test_data_without_images_are_refused():
    with pytest.raises(ValueError, match="image_column='image' is none of the data's columns .did you mean 'imgae'"):
        ImageRows(make_images(2).rename_column("image", "imgae"), NUM_LABELS)
    with pytest.raises(ValueError, match="label_column='label' is none"):
        ImageRows(make_images(2).rename_column("label", "x"), NUM_LABELS)
    with pytest.raises(ValueError, match="image_column='label' holds no images"):
        ImageRows(make_images(2), NUM_LABELS, image_column="label")
    with pytest.raises(ValueError, match="IterableDataset"):
        ImageRows(make_images(2).to_iterable_dataset(), NUM_LABELS)


@pytest.mark.parametrize("name", ["crop-flip", "resized-crop"])
def test_augmentation_follows_from_seed_epoch_and_row(name):
    def rows(seed):
        return ImageRows(make_images(2), NUM_LABELS, make_augmentation(name, (8, 8)), seed)

    one, other = rows(0), rows(1)
    state = torch.get_rng_state()
    first = one[0]["image"]
    assert torch.equal(first, one[0]["image"]) and torch.equal(state, torch.get_rng_state())
    assert first.shape == ((3, 8, 8) if name == "resized-crop" else (3, 16, 16))
    assert not torch.equal(first, other[0]["image"])
    one.set_epoch(1)
    assert not torch.equal(first, one[0]["image"])


def test_a_crop_of_images_that_no_processor_resizes_keeps_their_size(tmp_path):
    args = LocalImageConfig(**options(tmp_path, augmentation="resized-crop"))
    trainer = LocalImageTrainer(make_model("resnet"), args, train_dataset=make_images())
    assert trainer.train_dataset[0]["image"].shape == (3, 16, 16)


def test_loading_processes_that_stay_draw_anew_in_each_epoch():
    """Whether they are forked or given a pickle, as on other systems and since Python 3.14."""
    rows = ImageRows(make_images(2), NUM_LABELS, make_augmentation("crop-flip", (8, 8)))
    loader = torch.utils.data.DataLoader(rows, 2, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in range(2):
        rows.set_epoch(epoch)
        expected = torch.stack([rows[index]["image"] for index in range(2)])
        epochs.append(next(iter(loader))["image"])
        assert torch.equal(epochs[-1], expected)
    assert not torch.equal(*epochs)
    assert torch.equal(pickle.loads(pickle.dumps(rows.augmentation))(torch.zeros(3, 16, 16)), torch.zeros(3, 16, 16))


def test_batches_are_the_image_processors():
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    rows = ImageRows(make_images(3), NUM_LABELS)
    batch = ImageBatches(processor)([rows[index] for index in range(3)])
    images = [row["image"] for row in make_images(3)]
    expected = processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == make_images(3)["label"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"local_objective": "readout"}, "local_objective='readout' does not work with model=ResNet"),
        ({"reconstruction_weight": 1.0}, "reconstruction_weight=1.0 does nothing with local_objective='classifier'"),
        ({"tied_embeddings": "freeze"}, "tied_embeddings='freeze' does nothing for an image classifier"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not work with local learning"),
        ({"num_blocks": 7}, "num_blocks=7 does not fit a model with 6"),
        ({"augmentation": "crop"}, "augmentation='crop' is unknown"),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        args = LocalImageConfig(**options(tmp_path, **settings))
        LocalImageTrainer(make_model("resnet"), args, train_dataset=make_images())


def test_accuracy_is_measured(tmp_path):
    trainer = LocalImageTrainer(
        make_model("vit"),
        LocalImageConfig(**options(tmp_path)),
        train_dataset=make_images(),
        eval_dataset=make_images(8),
    )
    measured = trainer.evaluate()["eval_accuracy"]
    rows = ImageRows(make_images(8), NUM_LABELS)
    batch = trainer.data_collator([rows[index] for index in range(8)])
    with torch.no_grad():
        logits = trainer.model.eval()(batch["pixel_values"]).logits
    assert measured == pytest.approx((logits.argmax(-1) == batch["labels"]).float().mean().item())


def test_data_sets_are_taken_wherever_a_trainer_takes_them(tmp_path):
    args = LocalImageConfig(**options(tmp_path))
    named = {"a": make_images(8), "b": make_images(4, seed=1)}
    trainer = LocalImageTrainer(make_model("vit"), args, train_dataset=make_images(), eval_dataset=named)
    measured = trainer.evaluate()
    assert measured["eval_a_accuracy"] == trainer.evaluate(make_images(8))["eval_accuracy"]
    assert trainer.predict(make_images(4, seed=1)).metrics["test_accuracy"] == measured["eval_b_accuracy"]
    with pytest.raises(ValueError, match="The images are a IterableDataset"):
        LocalImageTrainer(make_model("vit"), args, train_dataset=make_images().to_iterable_dataset())


def test_a_checkpoint_without_an_image_processor_is_said(tmp_path, caplog):
    make_model("vit").save_pretrained(tmp_path / "model")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    LocalImageTrainer(model, LocalImageConfig(**options(tmp_path)), train_dataset=make_images())
    assert any("has no image processor that can be loaded" in message for message in caplog.messages)
    caplog.clear()
    LocalImageTrainer(make_model("vit"), LocalImageConfig(**options(tmp_path)), train_dataset=make_images())
    assert not any("has no image processor" in message for message in caplog.messages)
