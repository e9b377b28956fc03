"""The adapter that a command is asked for."""

import re
from typing import Any

from peft import PeftConfig
from trl import ModelConfig, get_peft_config

__all__ = ["adapter_config"]

_NAME = re.compile(r"[\w.]+")


def adapter_config(model_args: ModelConfig) -> PeftConfig | None:
    """Returns the adapter that TRL's arguments ask for; `None` without `use_peft`.

    TRL makes a text of a list with one name, which PEFT takes for a pattern that a module's whole path has to match.

    Args:
        model_args: The arguments.
    """
    config: Any = get_peft_config(model_args)
    if config is not None and isinstance(config.target_modules, str) and _NAME.fullmatch(config.target_modules):
        config.target_modules = {config.target_modules}  # the form that PEFT gives a list
    return config  # type: ignore[no-any-return]
