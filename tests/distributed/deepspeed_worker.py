"""One rank of the runs under DeepSpeed that `test_deepspeed.py` launches, one after the other in one world."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from safetensors.torch import save_file
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf.common.distributed import end_training
from tests.distributed.engines import use_real_engines
from tests.tiny import make_model
from tests.trainers.helpers import make_trainer, snapshot


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of three steps: the ZeRO stage, and what it trains with."""

    stage: int
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    lora: bool = False


_SAVED = {"save_strategy": "steps", "save_steps": 1}
_LEAN = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}
_FROZEN = {"tied_embeddings": "freeze"}
RUNS = {
    "ZeRO-1": Run(1, _SAVED),
    "ZeRO-2": Run(2, {**_SAVED, "num_blocks": 4}),
    "ZeRO-2, checkpointing, accumulation": Run(2, _LEAN),
    "ZeRO-2, tied": Run(2, {"early_learning_rate": 1e-4}, {"tie_word_embeddings": True}),
    "ZeRO-2, frozen": Run(2, {"train_early_blocks": False}),
    "ZeRO-2, no objective": Run(2, {"local_objective": "none"}),
    "ZeRO-2, dpo": Run(2, {"kind": "dpo"}),
    "ZeRO-2, LoRA": Run(2, lora=True),
    "ZeRO-3": Run(3, _SAVED),
    "ZeRO-3, checkpointing, accumulation": Run(3, _LEAN),
    "ZeRO-3, tied": Run(3, _FROZEN, {"tie_word_embeddings": True}),
    "ZeRO-3, LoRA": Run(3, lora=True),
}


def make_run(run: Run, output_dir: Path, **more: Any) -> Any:
    """The trainer of a run; with `more` also that of the same run in one process."""
    settings = {"clip_scope": "global", "per_device_train_batch_size": 2, **run.settings, **more}
    torch.manual_seed(0)
    model = make_model(**{"tie_word_embeddings": False, **run.model})
    kwargs = {"peft_config": LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)}
    return make_trainer(output_dir, model, trainer_kwargs=kwargs if run.lora else None, **settings)


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """What is trained, gathered where it is sharded, by the names that `snapshot` gives in one process."""
    if not is_deepspeed_zero3_enabled():
        weights = snapshot(trainer)
    else:
        import deepspeed

        weights = {}
        for name, parameter in trainer.model.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
    in_model = [name for name in weights if "local_heads." in name]
    heads = {f"head.{name.split('local_heads.')[1]}": weights.pop(name) for name in in_model}
    return {name: weight.contiguous() for name, weight in {**weights, **heads}.items()}


def run_on_this_rank(folder: Path, run: Run, resume: bool = False) -> Any:
    AcceleratorState._reset_state(reset_partial_state=False)
    unset_hf_deepspeed_config()  # the model below is one process's, bit for bit
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(run.stage)
    trainer = make_run(run, folder)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resume else None)
    end = "resumed" if resume else "weights"
    save_file(whole_weights(trainer), folder / f"{end}-{trainer.accelerator.process_index}.safetensors")
    return trainer


def main() -> None:
    use_real_engines()
    os.environ |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}
    trainer = None
    for name in sys.argv[2:] or RUNS:
        run, folder = RUNS[name], Path(sys.argv[1]) / name
        folder.mkdir(exist_ok=True)
        trainer = run_on_this_rank(folder, run)
        trainer.save_model(str(folder / "saved"))
        if run.settings.get("save_strategy"):
            trainer = run_on_this_rank(folder, run, resume=True)
    end_training(trainer)


if __name__ == "__main__":
    main()
