"""One rank of the FSDP2 runs that `conftest.py` launches, one after the other in one world."""

import contextlib
import gc
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import tests.conftest  # noqa: F401  (offline, one thread)
from lopt_hf.local.heads import LocalHeads
from lopt_hf.meters.saved_bytes import SavedBytes
from lopt_hf.trainers import saved_heads
from lopt_hf.trainers.checkpoint import HEADS_FILE
from tests.distributed.engines import use_real_engines
from tests.tiny import make_dataset, make_model
from tests.trainers.helpers import make_trainer

REACH: dict[str, Any] = {"local_objective": "none", "num_blocks": 4, "task_reach": [2, 4, 1]}
RESHARDED_LATE = {"FSDP_RESHARD_AFTER_FORWARD": "false"}
NO_WRAP = {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}

# The runs that must end where one process with the same micro-batches does.
EQUAL_TO_ONE: dict[str, dict[str, Any]] = {
    "joint": {"local_backward": "joint"},
    "4 blocks, global": {"num_blocks": 4, "clip_scope": "global"},
    "accumulation, part": {"num_blocks": 4, "gradient_accumulation_steps": 2, "clip_scope": "part"},
    "checkpointing, dpo": {"kind": "dpo", "gradient_checkpointing": True},
    "reentrant checkpointing": REENTRANT,
    "lora": {"lora": True, "num_blocks": 4},
    "mixture of experts": {"family": "mixtral"},
    # Its embedding of positions is block 0's, in the root's unit, and learns enough to be missed in the norm. AdamW
    # would blow up its keys' biases, whose gradient is rounding alone.
    "gpt2, local step": {
        **{"family": "gpt2", "local_step": True, "local_objective": "readout"},
        **{"optim": "sgd", "learning_rate": 0.1},
    },
    # So that the heads' gradients are to be clipped; an evaluation leaves the layers whole.
    "local step, part": {
        **{"num_blocks": 4, "local_step": True, "clip_scope": "part", "reconstruction_weight": 1000.0},
        **{"environment": RESHARDED_LATE, "eval_strategy": "steps", "eval_steps": 1},
    },
    "interval": {"local_update_interval": 2, "num_blocks": 3},
    "readout": {"local_objective": "readout"},
    "readout, frozen": {"local_objective": "readout", "lora": True},
    "reach, local step": {**REACH, "local_step": True},
    "reach, graphs kept": {**REACH, "reach_recompute": False},
    "reach, micro-batches": {
        **REACH,
        "reach_unit": "microbatch",
        "gradient_accumulation_steps": 2,
        "task_reach": [4, 1],
    },
    "reach, reconstruction": {**REACH, "local_objective": "reconstruction", "gradient_checkpointing": True},
    "reach, mixture of experts, run": {**REACH, "family": "mixtral", "reach_unit": "run"},
    # Whose embedding, norm and head accelerate makes one unit, of which a part has run when a block learns.
    "tied and frozen": {"tied": True, "tied_embeddings": "freeze", "num_blocks": 4},
    "resharded late": {"environment": RESHARDED_LATE, "num_blocks": 4},
    "one unit": {"environment": NO_WRAP},
}
# In bf16, whose rounding is that of the sharded arithmetic: local losses eager, joint, and with reach.
BF16: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": True, "num_blocks": 4},
    "bf16, joint": {"bf16": True, "num_blocks": 4, "local_backward": "joint"},
    "bf16, reach": {**REACH, "bf16": True},
    "bf16, readout": {"bf16": True, "local_objective": "readout"},
}
SAVED = {"num_blocks": 4, "save_strategy": "steps", "save_steps": 2}
FULL = {**SAVED, "environment": {"FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}}
SHARDED = {**SAVED, "environment": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}}
# Left after two of three steps, and gone on from there.
RESUMED: dict[str, dict[str, Any]] = {
    "full": FULL,
    "sharded": SHARDED,
    "sharded, lora": {**SHARDED, "lora": True},
    "full, heads within": FULL,
    "sharded, heads within": SHARDED,
    "readout": {**FULL, "local_objective": "readout"},
    "reach": {**REACH, **SHARDED},
    # At its checkpoint, only the last block has stepped.
    "reach, run, full": {**REACH, **FULL, "task_reach": [1, 4], "reach_unit": "run"},
    "reach, run, sharded": {**REACH, **SHARDED, "task_reach": [1, 4], "reach_unit": "run"},
}
# Of those the ones whose checkpoints have the heads among the model's weights, and no states of random numbers.
HEADS_WITHIN = ("full, heads within", "sharded, heads within")
# The first of three evaluations is the best: the rate is so high that the loss only rises.
BEST: dict[str, Any] = {
    **{"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
    **{"load_best_model_at_end": True, "learning_rate": 10.0},
}
# The classes of the modules that have been the root of a forward in the run under way.
ROOTS: set[str] = set()
# How many blocks an eager run's activations are measured with; a joint one with two.
MEASURED = (2, 4, 8)


def run(
    output_dir: Path,
    lora: bool = False,
    family: str = "llama",
    layers: int = 4,
    tied: bool = False,
    environment: Mapping[str, str] | None = None,
    resume: bool | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **settings: Any,
) -> Any:
    """A run with the same micro-batches, however they are spread over processes and accumulation steps."""
    kwargs: dict[str, Any] = {"callbacks": list(callbacks), "eval_dataset": make_dataset(8)}
    if lora:
        kwargs["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"per_device_train_batch_size": 2, **settings}
    if settings.get("kind") == "dpo":
        kwargs.pop("eval_dataset")
    changed = ({"num_hidden_layers": layers} if layers != 4 else {}) | ({"tie_word_embeddings": True} if tied else {})
    model = make_model(family, **changed)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (environment or {}).items():
            patch.setenv(name, value)
        trainer = make_trainer(output_dir, model=model, trainer_kwargs=kwargs, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def whole_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """What a run has trained, heads included, by the same names on any number of processes."""
    model = {n: p for n, p in trainer.model.named_parameters() if "local_heads." not in n and p.requires_grad}
    heads = {f"head.{n}": p for n, p in trainer.local_heads.named_parameters()}
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in {**model, **heads}.items()}
    return {name: parameter.detach().clone().contiguous() for name, parameter in whole.items()}


def note_roots() -> None:
    """Notes in `ROOTS`, from now on, of which class a unit is that takes itself for the root of a forward."""

    def root_pre_forward(state: FSDPState, module: torch.nn.Module, *args: Any) -> Any:
        is_in_forward = state._state_ctx.iter_forward_root is not None
        result = stock(state, module, *args)
        if not is_in_forward:
            ROOTS.add(type(module).__name__)
        return result

    stock = FSDPState._root_pre_forward
    FSDPState._root_pre_forward = root_pre_forward


def keep(folder: Path, trainer: Any) -> None:
    """Writes what a run ended with, and tells what it was."""
    assert isinstance(trainer.model, FSDPModule)
    units = {isinstance(head, FSDPModule) for head in trainer.local_heads.values() if list(head.parameters())}
    assert units <= {trainer.boundary.mode == "eager"}
    weights = whole_weights(trainer)
    if trainer.accelerator.is_main_process:
        save_file(weights, folder / "weights.safetensors")
        facts = {"log": trainer.state.log_history, "mode": trainer.boundary.mode, "engine": trainer.learner.run.engine}
        facts["roots"] = sorted(ROOTS)
        (folder / "facts.json").write_text(json.dumps(facts))
    ROOTS.clear()
    trainer.accelerator.wait_for_everyone()


def keep_resumed(folder: Path, settings: dict[str, Any], heads_within: bool = False) -> None:
    """Runs to the end in `whole`, and again in `resumed` from its second step on."""
    for part in ("whole", "resumed"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if heads_within:
            patch.setattr(LocalHeads, "left_out", lambda heads, model: contextlib.nullcontext())
        trainer = run(folder / "whole", **settings)
    keep(folder / "whole", trainer)
    if trainer.accelerator.is_main_process:
        left = (HEADS_FILE, "rng_state_*") if heads_within else ()
        ignored = shutil.ignore_patterns(*left)
        shutil.copytree(folder / "whole/checkpoint-2", folder / "resumed/checkpoint-2", ignore=ignored)
    trainer.accelerator.wait_for_everyone()
    with pytest.MonkeyPatch.context() as patch:
        if not trainer.accelerator.is_main_process:  # as where each node saves for itself
            patch.setattr(saved_heads, "load_heads", lambda checkpoint: {})
        trainer = run(folder / "resumed", resume=True, **settings)
    keep(folder / "resumed", trainer)


class SecondStep(TrainerCallback):
    """Measures what autograd keeps in the second step, when every unit has been whole once."""

    def __init__(self) -> None:
        self.peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step != 1:
            return
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        whole: list[torch.Tensor] = []
        for unit in units:
            unit.unshard()
            whole += [p for p in unit.parameters() if not isinstance(p, DTensor)]
            unit.reshard()
        self._meter = SavedBytes([*whole, *model.buffers()])
        self._meter.__enter__()

    def on_step_end(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self._meter.__exit__()
            self.peak = self._meter.peak


def saved_bytes(folder: Path, **settings: Any) -> int:
    """The peak of what autograd keeps on this rank, with eight layers."""
    meter = SecondStep()
    run(folder, layers=8, callbacks=(meter,), max_steps=2, **settings)
    return meter.peak


def main() -> None:
    folder = Path(sys.argv[1])
    gc.freeze()  # as in tests/conftest.py
    use_real_engines()
    note_roots()
    for name, settings in (EQUAL_TO_ONE | BF16 | {"best": BEST}).items():
        (folder / name).mkdir(exist_ok=True)
        keep(folder / name, run(folder / name, **settings))
    for name, settings in RESUMED.items():
        keep_resumed(folder / name, settings, name in HEADS_WITHIN)
    peaks = {"joint": saved_bytes(folder / "bytes", local_backward="joint")}
    peaks |= {str(blocks): saved_bytes(folder / "bytes", num_blocks=blocks) for blocks in MEASURED}
    (folder / "bytes.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    main()
