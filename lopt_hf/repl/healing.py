"""Healing: fine-tuning after layers were replaced or removed."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from lopt_hf.common.arithmetic import pick_bf16
from lopt_hf.data.formats import load_sft_dataset, to_trl_format
from lopt_hf.repl.trainer import RepLTrainer

__all__ = ["HealingConfig", "heal", "healing_data", "read_text"]


@dataclass
class HealingConfig(SFTConfig):
    """`SFTConfig` without activation checkpointing, and for a machine without an accelerator.

    There `use_cpu` is set, and `bf16`, if it is left out, to what is the faster.
    """

    activation_checkpointing: bool | None = field(  # ours: fewer layers keep fewer activations
        default=False, metadata={"help": "Recompute activations in the backward instead of keeping them."}
    )

    def __post_init__(self) -> None:
        # transformers refuses bf16, the default of TRL's configs, on such a machine unless told that this is meant.
        if not torch.accelerator.is_available():
            self.use_cpu = True
        self.leaves_dtype_open = self.bf16 is None and not self.fp16
        if self.use_cpu:
            self.bf16 = pick_bf16(self.bf16, self.fp16)
        super().__post_init__()


def read_text(name: str, option: str) -> str:
    """Reads a text file.

    Raises:
        ValueError: If there is none.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{option}={name!r} is no file here; give the path of a text file.")
    return path.read_text(encoding="utf-8")


def healing_data(name: str, tokenizer: Any, length: int) -> Dataset:
    """Loads healing data; a text file is cut into rows of `length` tokens."""
    if not name.endswith(".txt"):
        return to_trl_format(load_sft_dataset(name))  # type: ignore[return-value]
    token_ids = tokenizer(read_text(name, "dataset_name"), add_special_tokens=False, verbose=False)["input_ids"]
    rows = [token_ids[start : start + length] for start in range(0, len(token_ids) - length + 1, length)]
    return Dataset.from_dict({"input_ids": rows})


def heal(model: Any, seed: int, dataset: Dataset, args: HealingConfig, model_args: ModelConfig, tokenizer: Any) -> Any:
    """Fine-tunes a model, RepL or plain, and returns it without adapters."""
    is_repl = "repl" in model.config.to_dict()
    run_args = replace(args, seed=seed, output_dir=f"{args.output_dir}/healing")
    set_seed(seed)
    peft_config: Any = get_peft_config(model_args)
    if peft_config is not None and is_repl:
        peft_config.modules_to_save = ["surrogate"]
    kind: Any = RepLTrainer if is_repl else SFTTrainer
    trainer = kind(model, args=run_args, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config)
    trainer.train()
    trained = trainer.model
    return trained.merge_and_unload() if peft_config is not None else trained
