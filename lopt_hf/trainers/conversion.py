"""Training arguments of one config class as those of another."""

from dataclasses import fields
from typing import Any, TypeVar

from transformers import PreTrainedModel, TrainingArguments
from trl.trainer.utils import get_config_model_id

__all__ = ["convert_config", "local_config"]

ConfigT = TypeVar("ConfigT", bound=TrainingArguments)


def convert_config(args: TrainingArguments, config_class: type[ConfigT]) -> ConfigT:
    """Makes a config of another class with the same values; what the class does not know is left out.

    Args:
        args: Arguments that have been through their class's checks.
        config_class: The class to make, such as `SFTConfig` of a `LoPTConfig`, or the other way round.
    """
    known = {f.name for f in fields(config_class) if f.init}
    # Not by `to_dict`, which hides every field whose name ends in `_token`.
    values: dict[str, Any] = {f.name: getattr(args, f.name) for f in fields(args) if f.init and f.name in known}
    if values.get("steps_per_generation") is not None:
        values.pop("generation_batch_size")  # GRPOConfig has computed one from the other, and takes one only
    return config_class(**values)


def local_config(
    model: str | PreTrainedModel, args: TrainingArguments | None, config_class: type[ConfigT], suffix: str
) -> ConfigT:
    """The arguments of a trainer with local learning, from what a user passed as `args`.

    Args:
        model: The model, whose name begins the default output folder.
        args: A config of this class, of its parent in TRL, or none.
        config_class: The class that the trainer needs.
        suffix: The end of the default output folder's name.
    """
    if args is None:
        model_id = model if isinstance(model, str) else get_config_model_id(model.config)
        return config_class(f"{model_id.split('/')[-1]}-{suffix}")
    return args if isinstance(args, config_class) else convert_config(args, config_class)
