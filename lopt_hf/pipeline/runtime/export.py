"""Export of a pipeline's checkpoint as a stock model.

The stages are loaded one after the other, so memory stays at the largest of them.
"""

import shutil
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from lopt_hf.pipeline.runtime.checkpoint import (
    ADAPTER_CONFIG,
    INCOMPLETE,
    Manifest,
    assemble_model,
    load_weights,
    saved_names,
)
from lopt_hf.pipeline.runtime.stage import StagePlan, load_stage

__all__ = ["export_checkpoint"]


def export_checkpoint(checkpoint: Path, output_dir: Path, model_name_or_path: str | None = None) -> None:
    """Writes a checkpoint's model as a stock checkpoint; of a run with adapters, the adapter.

    Args:
        checkpoint: The pipeline's checkpoint.
        output_dir: A new folder.
        model_name_or_path: The model that the run started from. Default: the one that the checkpoint names.

    Raises:
        ValueError: If the checkpoint is not complete, or `output_dir` exists.
    """
    manifest = Manifest(checkpoint)
    if output_dir.exists():
        raise ValueError(f"output_dir={str(output_dir)!r} exists; name a new folder.")
    start = model_name_or_path or manifest.content["model"]
    staged = output_dir / f"{INCOMPLETE}model"
    for plan, folder in zip(manifest.plans, manifest.stage_folders, strict=True):
        _save_stage(start, plan, folder, manifest, staged / plan.name)
    assemble_model([staged / plan.name for plan in manifest.plans], output_dir)
    AutoTokenizer.from_pretrained(start).save_pretrained(output_dir)
    shutil.rmtree(staged)


def _save_stage(start: str, plan: StagePlan, folder: Path, manifest: Manifest, target: Path) -> None:
    model: Any = load_stage(start, plan)
    if (folder / ADAPTER_CONFIG).is_file():
        model = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
    saved = saved_names(folder)
    load_weights({name: tensor for name, tensor in model.state_dict().items() if name in saved}, [folder])
    if isinstance(model, PeftModel):
        return model.save_pretrained(str(target))
    config = model.config.get_text_config(decoder=True)
    keeps_tie = config.tie_word_embeddings and manifest.content["tied_embeddings"] == "freeze"
    model.config.tie_word_embeddings = config.tie_word_embeddings = keeps_tie
    state = model.state_dict(keep_vars=True)
    if keeps_tie and plan.is_last:  # it is saved with the embeddings, on the first stage
        head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
        state = {name: tensor for name, tensor in state.items() if id(tensor) not in head}
    model.save_pretrained(target, state_dict=state)
