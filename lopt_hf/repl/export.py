"""Folded models for people who do not have this package."""

import json
import shutil
from pathlib import Path
from typing import Any

from lopt_hf.repl import configuration_repl, modeling_repl
from lopt_hf.repl.configuration_repl import FoldedRepLConfig

__all__ = ["save_with_code"]


def save_with_code(model: Any, save_directory: str | Path) -> None:
    """Saves a folded model with its own modelling files, to be loaded with `trust_remote_code=True`.

    Args:
        model: What `merge_and_unload` returned.
        save_directory: Folder of the checkpoint.

    Raises:
        ValueError: If the model is not folded.
    """
    if model.config.model_type != FoldedRepLConfig.model_type:
        raise ValueError(f"model={type(model).__name__} is not folded; call its merge_and_unload() first.")
    folder = Path(save_directory)
    model.save_pretrained(folder)
    for module in (configuration_repl, modeling_repl):
        shutil.copy(str(module.__file__), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "configuration_repl.FoldedRepLConfig"}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
