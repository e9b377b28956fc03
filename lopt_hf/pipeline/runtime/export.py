"""The stock model that the stages of a pipeline make together, at the end of a run or from a checkpoint."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import upload_folder
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
)

from lopt_hf.common.files import publish_folder
from lopt_hf.pipeline.runtime.adapters import adapt_saved_stage
from lopt_hf.pipeline.runtime.checkpoint import INCOMPLETE, WEIGHTS_FILE, Manifest, load_weights
from lopt_hf.pipeline.runtime.stage import load_stage
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.trainers.checkpoint import check_files

__all__ = [
    "assemble_model",
    "export_checkpoint",
    "exporting",
    "push_model",
    "save_model_files",
    "save_stage_model",
]


def assemble_model(stage_folders: Sequence[Path], output_dir: Path) -> None:
    """Makes one stock checkpoint of what `save_pretrained` wrote for each stage; the weight files are moved, not read.

    Args:
        stage_folders: The stages' folders, in order, on the same file system as `output_dir`.
        output_dir: Where the checkpoint goes.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    last = stage_folders[-1]
    if (last / ADAPTER_CONFIG_NAME).is_file():
        parts = [load_file(folder / ADAPTER_SAFE_WEIGHTS_NAME) for folder in stage_folders]
        save_file({name: tensor for part in parts for name, tensor in part.items()}, last / "whole.safetensors")
        os.replace(last / "whole.safetensors", output_dir / ADAPTER_SAFE_WEIGHTS_NAME)
        os.replace(last / ADAPTER_CONFIG_NAME, output_dir / ADAPTER_CONFIG_NAME)
        return
    # Without an index a model cannot be loaded; with that of an earlier run's it would be loaded from parts of both.
    (output_dir / SAFE_WEIGHTS_INDEX_NAME).unlink(missing_ok=True)
    files = [file for folder in stage_folders for file in sorted(folder.glob("*.safetensors"))]
    weight_map: dict[str, str] = {}
    total_size = 0
    for index, file in enumerate(files):
        name = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        with safe_open(file, framework="pt") as weights:
            weight_map.update(dict.fromkeys(weights.keys(), name))
        total_size += file.stat().st_size
        os.replace(file, output_dir / name)
    index_content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (last / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index_content, indent=2), encoding="utf-8")
    for name in (CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME):  # the index last
        if (last / name).is_file():
            os.replace(last / name, output_dir / name)


def save_stage_model(trainer: Any, target: Path) -> None:
    """Makes one stock checkpoint of all stages; every process must call it, and waits until it is complete."""
    staged = target / f"{INCOMPLETE}model"
    store = trainer.world.new_run_store()
    if trainer.world.replica == 0:
        folder = staged / trainer.plan.name
        shutil.rmtree(folder, ignore_errors=True)
        trainer._save(str(folder), _exported_state(trainer))
        if store.add("written", 1) == len(trainer.plans):
            assemble_model([staged / plan.name for plan in trainer.plans], target)
            if trainer.processing_class is not None:
                trainer.processing_class.save_pretrained(target)
            shutil.rmtree(staged)
            store.set("complete", "")
    trainer.world.monitor.wait_for(store, "complete")


def save_model_files(trainer: Any, folder: Path) -> None:
    """Writes what a run's model has beside weights into a checkpoint: its options may have changed the start's.

    Args:
        trainer: The last stage's trainer.
        folder: The stage's folder.
    """
    base_model = trainer.learner.base_model
    base_model.config.save_pretrained(folder)
    if base_model.can_generate():
        base_model.generation_config.save_pretrained(folder)
    if trainer.processing_class is not None:
        trainer.processing_class.save_pretrained(folder)


def _exported_state(trainer: Any) -> dict[str, torch.Tensor] | None:
    """What goes into the model: a head that is tied to the embeddings is saved with them, on another stage."""
    if isinstance(trainer.model, PeftModel):
        return None
    others = {} if trainer.plan.is_last else trainer.learner.owned()[-1]  # the frozen readout
    state = {name: tensor for name, tensor in trainer.model.state_dict().items() if name not in others}
    base_model = trainer.learner.base_model
    head = base_model.get_output_embeddings() if trainer.plan.is_last else None  # of images there is none
    if head is not None and base_model.config.get_text_config(decoder=True).tie_word_embeddings:
        own = {id(parameter) for parameter in head.parameters()}
        state = {n: t for n, t in trainer.model.state_dict(keep_vars=True).items() if id(t) not in own}
    return state


def push_model(trainer: Any) -> None:
    """Uploads the saved model to the hub, without the checkpoints."""
    upload_folder(
        repo_id=str(trainer.hub_model_id),
        folder_path=str(trainer.args.output_dir),
        token=trainer.args.hub_token,
        commit_message="End of training",
        revision=trainer.args.hub_revision,
        ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*", f"{INCOMPLETE}*"],  # "_*" as the stock trainers
    )


@contextmanager
def exporting(output_dir: Path) -> Iterator[Path]:
    """Gives a folder for a model, beside its place; it gets its name at the end of the block, and not if that fails.

    Args:
        output_dir: A new folder.

    Raises:
        ValueError: If it exists.
    """
    if output_dir.exists():
        raise ValueError(f"output_dir={str(output_dir)!r} exists; name a new folder.")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f"{INCOMPLETE}{output_dir.name}-", dir=output_dir.parent))
    try:
        yield staged / "model"
        publish_folder(staged / "model", output_dir)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def export_checkpoint(checkpoint: Path, output_dir: Path, model_name_or_path: str | None = None) -> None:
    """Writes a checkpoint's model as a stock checkpoint; of a run with adapters, the adapter.

    Tokenizer, chat template, config and generation config are the run's, or the start's where the checkpoint is from
    before it held them. The stages are loaded one after the other, so memory stays at the largest of them.

    Args:
        checkpoint: The pipeline's checkpoint.
        output_dir: A new folder.
        model_name_or_path: The model that the run started from. Default: the one that the checkpoint names.

    Raises:
        ValueError: If the checkpoint is not complete or damaged, is of another model, or `output_dir` exists.
    """
    manifest = Manifest(checkpoint)
    start = model_name_or_path or manifest.content["model"]
    with exporting(output_dir) as folder:
        tokenizer = _load_tokenizer(start, manifest)  # before the work
        config = _load_config(start, manifest)
        parts = [folder.parent / plan.name for plan in manifest.plans]
        for plan, stage_folder, part in zip(manifest.plans, manifest.stage_folders, parts, strict=True):
            _export_stage(start, config, plan, stage_folder, manifest, part)
        assemble_model(parts, folder)
        tokenizer.save_pretrained(folder)


def _load_tokenizer(start: str, manifest: Manifest) -> Any:
    last = manifest.stage_folders[-1]
    if (last / TOKENIZER_CONFIG_FILE).is_file():
        return AutoTokenizer.from_pretrained(last)
    return AutoTokenizer.from_pretrained(start, revision=manifest.revision)


def _load_config(start: str, manifest: Manifest) -> PretrainedConfig:
    """The run's config, but for whether embeddings and LM head are one weight, which is as in the start's files."""
    at_start = AutoConfig.from_pretrained(start, revision=manifest.revision)
    last = manifest.stage_folders[-1]
    config = AutoConfig.from_pretrained(last) if (last / CONFIG_NAME).is_file() else at_start
    is_tied = at_start.get_text_config(decoder=True).tie_word_embeddings
    config.tie_word_embeddings = config.get_text_config(decoder=True).tie_word_embeddings = is_tied
    return config


def _export_stage(
    start: str, config: PretrainedConfig, plan: StagePlan, folder: Path, manifest: Manifest, target: Path
) -> None:
    dtype = manifest.content.get("dtype", "auto")  # the start's own may be a coarser one
    model: Any = load_stage(start, plan, config=config, dtype=dtype, revision=manifest.revision)
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        model = adapt_saved_stage(model, PeftConfig.from_pretrained(str(folder)))
    check_files(str(folder), [WEIGHTS_FILE], {name: tensor.shape for name, tensor in model.state_dict().items()})
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        saved = set(file.keys())
    load_weights({name: tensor for name, tensor in model.state_dict().items() if name in saved}, [folder])
    if isinstance(model, PeftModel):
        return model.save_pretrained(str(target))
    text_config = model.config.get_text_config(decoder=True)
    keeps_tie = text_config.tie_word_embeddings and manifest.content["tied_embeddings"] == "freeze"
    model.config.tie_word_embeddings = text_config.tie_word_embeddings = keeps_tie
    state = model.state_dict(keep_vars=True)
    if keeps_tie and plan.is_last:  # it is saved with the embeddings, on the first stage
        head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
        state = {name: tensor for name, tensor in state.items() if id(tensor) not in head}
    last = manifest.stage_folders[-1]
    if (last / GENERATION_CONFIG_NAME).is_file():
        model.generation_config = GenerationConfig.from_pretrained(last)
    model.save_pretrained(target, state_dict=state)
