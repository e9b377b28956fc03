"""A checkpoint of an image classifier's pipeline as a stock model."""

from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.utils import IMAGE_PROCESSOR_NAME

from lopt_hf.pipeline.runtime.checkpoint import WEIGHTS_FILE, Manifest, load_weights
from lopt_hf.pipeline.runtime.export import exporting
from lopt_hf.trainers.checkpoint import check_files

__all__ = ["export_image_checkpoint", "is_of_images"]


def is_of_images(manifest: Manifest) -> bool:
    """Tells whether a checkpoint is of an image classifier."""
    return (manifest.stage_folders[-1] / IMAGE_PROCESSOR_NAME).is_file()


def export_image_checkpoint(manifest: Manifest, output_dir: Path) -> None:
    """Writes a checkpoint's model and image processor as a stock checkpoint.

    Args:
        manifest: The pipeline's checkpoint.
        output_dir: A new folder.

    Raises:
        ValueError: If `output_dir` exists, or the checkpoint has no frozen weights or is damaged.
    """
    if not manifest.content["train_early_blocks"]:
        raise ValueError(
            f"checkpoint={str(manifest.folder)!r} was trained with train_early_blocks=False, and does not have the "
            "weights that were frozen; resume the run, which saves the whole model at its end."
        )
    last = manifest.stage_folders[-1]
    with exporting(output_dir) as folder:
        model = AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(last))
        state = model.state_dict()
        for stage_folder in manifest.stage_folders:
            check_files(str(stage_folder), [WEIGHTS_FILE], {name: tensor.shape for name, tensor in state.items()})
        load_weights(state, manifest.stage_folders)
        model.save_pretrained(folder)
        AutoImageProcessor.from_pretrained(last).save_pretrained(folder)
