"""The weights of models on disk or on the hub, with an adapter's part in them.

transformers draws weights that a checkpoint lacks anew, tells so in a table, and goes on; here that is an error.
"""

import logging as standard_logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from lopt_hf.retention.references import ModelReference

__all__ = ["auto_class_of", "check_files", "load_adapter", "load_full", "load_merged", "load_pair"]

logger = logging.get_logger(__name__)

# What reading a file that ends too early or holds something else raises, beside an OSError, which names it
READ_ERRORS = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError)
MISSING_IN_ADAPTER = "Found missing adapter keys"  # how a warning of PEFT begins, which has no class


def load_pair(baseline: ModelReference, model: ModelReference) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Loads a baseline and a model to host memory.

    Both are in the type that the model was saved in, an adapter's base for an adapter: the rounding of an fp32
    baseline is no change of a bf16 model.

    Raises:
        ValueError: If one is an adapter that is no change of weights, or as in `load_full` and `load_adapter`.
    """
    after = _load(model, "auto")
    before = _load(baseline, after.dtype)
    return _merged(before, baseline), _merged(after, model)


def load_merged(reference: ModelReference, dtype: torch.dtype) -> PreTrainedModel:
    """Loads one model to host memory in a type, an adapter's part computed in fp32.

    Raises:
        ValueError: As `load_pair`.
    """
    is_full = reference.adapter is None
    return _merged(_load(reference, dtype if is_full else torch.float32), reference).to(dtype)  # type: ignore[arg-type]


def auto_class_of(config: PretrainedConfig) -> Any:
    """The class of transformers that lm-eval loads a model with, by its configuration."""
    is_pair = config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM


def load_full(reference: ModelReference, auto_class: Any = AutoModelForCausalLM, **options: Any) -> PreTrainedModel:
    """Loads a full model, or an adapter's base, with all of its weights.

    Args:
        reference: The model.
        auto_class: transformers' class.
        options: Arguments of its `from_pretrained`.

    Raises:
        ValueError: If its files cannot be read, or a weight is missing or of another shape than its configuration
            says; names the model and the first such weight. Tied weights and buffers that are not stored are not
            missing.
    """
    name = _name_of(reference)
    with _reading(name), _without_table():
        model, found = auto_class.from_pretrained(
            reference.base, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_loaded(name, *(found[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")))
    return model


def load_adapter(model: PreTrainedModel, reference: ModelReference) -> PeftModel:
    """Puts an adapter on its base.

    Raises:
        ValueError: If its files cannot be read, or it lacks weights or has them in other shapes than the base needs.
    """
    assert reference.adapter is not None
    try:
        with _reading(f"the adapter {reference.name!r}"), warnings.catch_warnings():
            warnings.filterwarnings("error", MISSING_IN_ADAPTER)
            return PeftModel.from_pretrained(model, reference.adapter, revision=reference.adapter_revision)
    except UserWarning as error:
        raise ValueError(
            f"the adapter {reference.name!r} lacks weights, which would be drawn anew ({_start_of(error)}); save or "
            "copy it again, or give the base that it was trained on."
        ) from error


def check_files(reference: ModelReference) -> None:
    """Checks before anything takes time that a model in a folder here is whole; nothing is fetched from the hub.

    Raises:
        ValueError: As in `load_full`; or if an adapter has no weights, or they cannot be read.
        OSError: If a file of weights is not there.
    """
    if reference.adapter is not None and Path(reference.adapter).is_dir():
        _check_adapter_files(reference.name, Path(reference.adapter))
    if not Path(reference.base).is_dir():
        return
    config = AutoConfig.from_pretrained(reference.base)
    if getattr(config, "quantization_config", None) is None:  # whose weights are made on a device
        with _without_progress_bars():
            load_full(reference, auto_class_of(config), device_map="meta")


def _load(reference: ModelReference, dtype: torch.dtype | str) -> PreTrainedModel:
    """The model, or an adapter's base."""
    return load_full(reference, revision=reference.revision, dtype=dtype)


def _merged(model: PreTrainedModel, reference: ModelReference) -> PreTrainedModel:
    """Puts an adapter's part into its base, in fp32, which does not round it away."""
    if reference.adapter is None:
        return model
    adapted = load_adapter(model.float(), reference)
    try:
        return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError) as error:  # of prompts and prefixes, which are no weights' change
        raise ValueError(
            f"the adapter {reference.name!r} ({adapted.active_peft_config.peft_type.value}) cannot be merged into its "
            "base's weights; give one that can, such as LoRA, or a full model."
        ) from error


def _name_of(reference: ModelReference) -> str:
    if reference.adapter is None:
        return f"model {reference.name!r}"
    return f"the base {reference.base!r} of the adapter {reference.name!r}"


def _check_loaded(name: str, missing: set[str], mismatched: set[tuple[str, Any, Any]], unexpected: set[str]) -> None:
    """Raises if weights were drawn anew, and says in one line which were left aside."""
    if missing:
        instead = f" (it has {min(unexpected)}, which is none of them)" if unexpected else ""
        raise ValueError(
            f"{name} lacks {len(missing)} of the weights that its config.json asks for, such as {min(missing)}"
            f"{instead}; they would be drawn anew. Save or copy it again, by the model's own `save_pretrained`."
        )
    if mismatched:
        weight, saved, asked = min(mismatched)
        raise ValueError(
            f"{name}: {weight} is of shape {list(saved)} in its files and of {list(asked)} by its config.json; put "
            "the files of one model together."
        )
    if unexpected:
        logger.warning_once(
            "%s has %s weights that its config.json does not ask for, such as %s; they are left aside.",
            *(name, len(unexpected), min(unexpected)),
        )


def _check_adapter_files(name: str, folder: Path) -> None:
    files = [folder / file for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / file).is_file()]
    if not files:
        raise ValueError(
            f"the adapter {name!r} has no weights ({SAFETENSORS_WEIGHTS_NAME}); save or copy it again, whole."
        )
    if files[0].suffix == ".safetensors":
        with _reading(f"the adapter {name!r}"), safe_open(files[0], "pt"):
            pass


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Says in one line what cannot be read."""
    try:
        yield
    except torch.OutOfMemoryError:  # no fault of the files
        raise
    except READ_ERRORS as error:
        raise ValueError(
            f"{name} cannot be loaded ({type(error).__name__}: {_start_of(error)}); if its files are damaged or cut "
            "off, save or copy it again."
        ) from error


def _start_of(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextmanager
def _without_table() -> Iterator[None]:
    """Leaves out the table of transformers in which weights are missing; what it says is said in a line here."""
    of_loading = standard_logging.getLogger("transformers.modeling_utils")
    of_loading.addFilter(_is_no_table)
    try:
        yield
    finally:
        of_loading.removeFilter(_is_no_table)


def _is_no_table(record: standard_logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
