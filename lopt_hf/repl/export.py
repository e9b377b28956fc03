"""Folded models for people who do not have this package."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from transformers.utils import logging

from lopt_hf.repl.config import UNFOLDED_MODEL_TYPE

__all__ = ["save_with_code"]

logger = logging.get_logger(__name__)


def save_with_code(model: Any, save_directory: str | Path, processing_class: Any = None) -> None:
    """Saves a folded model, its modelling files and its tokenizer, to be loaded with `trust_remote_code=True`.

    A model of its family's own class needs no code, and none is saved beside it.

    Args:
        model: What `merge_and_unload` returned.
        save_directory: Folder of the checkpoint.
        processing_class: The tokenizer or image processor. Default: the tokenizer of where the model was loaded from;
            if there is none, a warning says so.

    Raises:
        ValueError: If the model is not folded.
    """
    if model.config.model_type == UNFOLDED_MODEL_TYPE:
        raise ValueError(f"model={type(model).__name__} is not folded; call its merge_and_unload() first.")
    model.save_pretrained(save_directory)
    if processing_class is None:
        processing_class = _tokenizer_of(model)
    if processing_class is not None:
        processing_class.save_pretrained(save_directory)


def _tokenizer_of(model: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model.name_or_path)
    except (OSError, ValueError):
        logger.warning("no tokenizer was found with model=%r; none is saved beside it.", model.name_or_path)
        return None
