"""A pipeline whose gradients are optimizer steps late ends with the weights of one process with the same delays."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed
from trl import SFTConfig, SFTTrainer

from lopt_hf import LoPTConfig
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.embeddings import separate_embeddings
from tests.distributed.delayed_reference import DelayedTrainer, LocalAndDelayedTrainer
from tests.distributed.pipeline_worker import make_lora
from tests.distributed.test_pipeline import NUM_LAYERS, assert_equal, load_model, run_pipeline, save_start
from tests.tiny import make_dataset, make_tokenizer
from tests.trainers.helpers import training_args

DELAYED = {"gradient": "delayed", "max_steps": 5, "weight_decay": 0.1, "learning_rate": 3e-3}
# 32 rows in micro-batches of 4, three of them to a step: the third step of each epoch has two
ACCUMULATED = {**DELAYED, "gradient_accumulation_steps": 3, "max_steps": 7}
KEPT = {"gradient_recompute": False}
# Behind the fourth step the third's gradient alone is on its way, from the middle stage to the first
REACH_SAVES = {
    **ACCUMULATED,
    "num_blocks": 3,
    "task_reach": [2, 1, 3, 1],
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 4,
}

RUNS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "plain": {**DELAYED, "num_blocks": 2},
        "accumulation": {**ACCUMULATED, "num_blocks": 2, "split_at": [2]},
        "kept": {**DELAYED, **KEPT, "num_blocks": 2},
        "both": {**ACCUMULATED, "num_blocks": 2, "gradient": "local_and_delayed"},
        "checkpointing": {**DELAYED, "num_blocks": 2, "activation_checkpointing": True},
        "LoRA": {**DELAYED, "num_blocks": 2, "lora": True},
        "tied": {**DELAYED, "num_blocks": 2, "family": "gemma2", "tied": True},
        "bf16": {**DELAYED, "num_blocks": 2, "bf16": True},
        "packing": {**DELAYED, "num_blocks": 2, "packing": True, "max_length": 64},
        # With a load-balancing loss for each stage's layers, and in one process for each block's
        "experts": {**DELAYED, "num_blocks": 2, "family": "qwen3_moe", "router_aux_loss_coef": 0.5},
        "experts without balance": {**DELAYED, "num_blocks": 2, "family": "qwen3_moe", "router_aux_loss_coef": 0.0},
        "one step": {**DELAYED, "num_blocks": 2, "max_steps": 1},
        "prediction": {**ACCUMULATED, "num_blocks": 2, "weight_prediction": True},
        "warm-up": {**ACCUMULATED, "num_blocks": 2, "late_warmup_steps": 0.5},
        "reach": {**ACCUMULATED, "num_blocks": 2, "task_reach": [1, 1, 2], "max_steps": 8},
        "reach, both": {**DELAYED, "num_blocks": 2, "gradient": "local_and_delayed", "task_reach": "[2,1]"},
        "interval": {**DELAYED, "num_blocks": 2, "gradient": "local_and_delayed", "local_update_interval": 2},
    },
    3: {
        "plain": {**DELAYED, "num_blocks": 3},
        "accumulation": {**ACCUMULATED, "num_blocks": 3, "warmup_steps": 1},
        "kept": {**ACCUMULATED, **KEPT, "num_blocks": 3},
        "kept, weights of now": {**DELAYED, **KEPT, "num_blocks": 3, "weight_prediction": False},
        "both": {**DELAYED, "num_blocks": 3, "gradient": "local_and_delayed"},
        "LoRA": {**DELAYED, **KEPT, "num_blocks": 3, "lora": True},
        "one step": {**DELAYED, "num_blocks": 3, "max_steps": 1, "max_grad_norm": 0.0},
        "reach": {**ACCUMULATED, "num_blocks": 3, "task_reach": [1, 2, 1, 3], "max_steps": 9},
        "reach, kept": {
            **DELAYED,
            **KEPT,
            "num_blocks": 3,
            "task_reach": [3, 1],
            "reach_rate": "sqrt",
            "max_steps": 6,
        },
        "reach over the run": {**DELAYED, "num_blocks": 3, "task_reach": [3, 1], "reach_unit": "run", "max_steps": 5},
        "saves": {**REACH_SAVES},
        "resumed": {**REACH_SAVES, "resume": "saves/checkpoint-4"},
    },
    4: {
        "plain": {**DELAYED, "num_blocks": 4, "max_steps": 8, "late_warmup_steps": 0.4},
        "reach": {**DELAYED, "num_blocks": 4, "task_reach": [1, 4, 2, 3], "max_steps": 8},
    },
}
ONLY_IN_A_PIPELINE = (
    *("gradient", "gradient_recompute", "weight_prediction", "late_warmup_steps", "num_blocks", "split_at", "resume"),
    *("task_reach", "reach_unit", "reach_rate", "save_strategy", "save_steps"),
)
REACHES = {"reach, both": [2, 1, 2, 1, 2], "reach over the run": [3, 3, 3, 1, 1]}  # where they are no plain cycle


def run_one_process(
    folder: Path, output_dir: Path, settings: dict[str, Any], reaches: Sequence[int] = ()
) -> dict[str, torch.Tensor]:
    settings = {"max_grad_norm": 0.5, **settings}
    start = save_start(folder, settings.pop("family", "llama"), settings.pop("tied", False))
    lora = make_lora() if settings.pop("lora", False) else None
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    separate_embeddings(model, "untie")
    blocks = split_layers(NUM_LAYERS, settings["num_blocks"], settings.get("split_at"))
    given = {"train_dataset": make_dataset(), "processing_class": make_tokenizer(), "peft_config": lora}
    own = {name: value for name, value in settings.items() if name not in ONLY_IN_A_PIPELINE}
    own |= {"router_aux_loss_coef": 0.0}  # TRL's is of all layers together
    trainer: Any
    set_seed(42)
    if settings["gradient"] == "delayed":
        trainer = DelayedTrainer(model, SFTConfig(**training_args(output_dir, **own)), **given)
    else:
        cut = {"num_blocks": len(blocks), "split_at": [block.start for block in blocks[1:]]}
        trainer = LocalAndDelayedTrainer(model, LoPTConfig(**training_args(output_dir, **own, **cut)), **given)
    cycle = settings.get("task_reach", [len(blocks)])
    reaches = reaches or (cycle * settings["max_steps"])[: settings["max_steps"]]
    rates = [2**0.5, 2**0.5, 1.0] if settings.get("reach_rate") == "sqrt" else []  # reached at every second step
    recompute = settings.get("gradient_recompute", True)
    balance = settings.get("router_aux_loss_coef", 0.0)
    predicts = settings.get("weight_prediction", settings["gradient"] == "delayed" and len(blocks) > 2)
    warmup = settings.get("late_warmup_steps", None if predicts else 0.0)
    trainer.begin([block.start for block in blocks[1:]], recompute, predicts, reaches, rates, balance, warmup)
    trainer.train()
    trainer.finish()
    trainer.save_model()
    return load_model(output_dir)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs each world once, when its first test asks for it."""
    folders: dict[int, Path] = {}

    def folder_of(num_stages: int) -> Path:
        if num_stages not in folders:
            folders[num_stages] = tmp_path_factory.mktemp(f"stages-{num_stages}")
            run_pipeline(folders[num_stages], num_stages, RUNS[num_stages])
        return folders[num_stages]

    return folder_of


@pytest.mark.parametrize(("num_stages", "name"), [(k, name) for k, runs in RUNS.items() for name in runs])
def test_weights_equal_those_of_one_process_with_the_same_delays(finished, tmp_path, num_stages, name):
    folder = finished(num_stages)
    one = run_one_process(folder, tmp_path / "one", RUNS[num_stages][name], REACHES.get(name, ()))
    assert_equal(load_model(folder / name), one)


def test_a_run_of_one_step_is_a_step_of_end_to_end_training(finished, tmp_path):
    """Nothing has changed while the gradients were on their way, and none is lost at the end."""
    folder = finished(3)
    settings = {**RUNS[3]["one step"]}
    own = {name: value for name, value in settings.items() if name not in ONLY_IN_A_PIPELINE}
    model = AutoModelForCausalLM.from_pretrained(save_start(folder), dtype=torch.float32)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    args = SFTConfig(**training_args(tmp_path / "stock", **own))
    trainer = SFTTrainer(model, args, train_dataset=make_dataset(), processing_class=make_tokenizer())
    trainer.train()
    pipeline = load_model(folder / "one step")
    for name, weight in trainer.model.state_dict().items():
        assert not torch.equal(weight, before[name]), name
        torch.testing.assert_close(pipeline[name], weight, rtol=1e-5, atol=1e-6)
