"""Local learning for any TRL trainer."""

import contextlib
import math
import weakref
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging

from lopt_hf.blocks import Block, find_decoder_stack, parameters_by_block, split_layers, untie_output_embeddings
from lopt_hf.boundary import GradientBoundary, make_heads
from lopt_hf.callbacks import bind_callbacks
from lopt_hf.distributed import GradientReducer, broadcast_parameters, ignored_by_ddp
from lopt_hf.drift import WeightDrift
from lopt_hf.objectives import LocalObjective, ReconstructionObjective
from lopt_hf.readout import ReadoutObjective
from lopt_hf.trainers.checkpoint import CheckpointMixin, read_local_state
from lopt_hf.trainers.checks import check_output_dir
from lopt_hf.trainers.lopt_config import LocalLearningArguments

__all__ = ["LOPT_PAPER", "LoPTMixin"]

logger = logging.get_logger(__name__)

LOPT_PAPER = {
    "title": "Rethinking Local Learning: A Cheaper and Faster Recipe for LLM Post-Training",
    "id": "2605.04913",
    # docstyle-ignore
    "citation": """\
@article{shi2026lopt,
    title  = {{Rethinking Local Learning: A Cheaper and Faster Recipe for LLM Post-Training}},
    author = {Shi, Hengyu and Han, Tianyang and Wang, Peizhe and Wang, Zhiling and others},
    year   = 2026,
    eprint = {arXiv:2605.04913},
}""",
}


class LoPTMixin(CheckpointMixin):
    """Adds local learning to a TRL trainer; put it before the trainer in the list of base classes.

    The config class must mix in `LocalLearningArguments` in the same way. What is added: the gradient boundary on the
    model, the heads in the optimizer, clipping per block, the all-reduce of the early blocks' gradients under DDP,
    `local_loss/block_i` and `drift/block_i` in the logs, and exact resuming.

    Args:
        local_objective: The early blocks' objective. Default: the one that `args.local_objective` names.
        *trainer_args: Positional arguments of the TRL trainer.
        **trainer_kwargs: Keyword arguments of the TRL trainer.

    Raises:
        ValueError: If the model has no single decoder stack, or if an option does not work under the engine (FSDP,
            DeepSpeed) that the run is launched with.
    """

    def __init__(
        self, *trainer_args: Any, local_objective: LocalObjective | None = None, **trainer_kwargs: Any
    ) -> None:
        super().__init__(*trainer_args, **trainer_kwargs)
        bind_callbacks(self.callback_handler.callbacks, self)
        args: LocalLearningArguments = self.args
        base_model = self._base_model()
        self._check_fsdp()
        self.stack = find_decoder_stack(base_model)
        self.blocks = split_layers(len(self.stack.layers), args.num_blocks, args.split_at)
        self.early_blocks = self._early_blocks_here()
        self._separate_embeddings(base_model)
        if not args.train_early_blocks:
            for parameter in self._early_parameters():
                parameter.requires_grad_(False)
        self._check_trainable()
        objective = self._objective = local_objective or self._make_objective(base_model)
        learning = self.early_blocks if args.train_early_blocks else []
        self.local_heads = make_heads(objective, self.stack.hidden_size, self.blocks, self.args.seed, only=learning)
        for block in learning:
            self.local_heads[str(block.index)].to(self._device_of(block))
        self._heads_in_model = args.sharding_engine is not None
        if self._heads_in_model:  # the engine shards, steps and saves what is in the model. Untested on GPU.
            base_model.add_module("local_heads", self.local_heads)
        self.boundary = GradientBoundary(
            base_model,
            self.blocks,
            objective,
            self.local_heads,
            weight=self._local_weight(),
            mode=args.pick_local_backward(),
            router_coefficient=self._router_coefficient(),
            early_blocks=self.early_blocks,
        )
        weakref.finalize(self, self.boundary.remove)
        if args.local_backward == "auto" and self.boundary.mode == "joint":
            logger.warning(
                f"local_backward='auto' is 'joint' under {args.sharding_engine or args.optim}: the early blocks' "
                "activations are kept until the common backward."
            )
        elif args.local_backward == "auto":
            logger.info("local_backward='auto' is 'eager': each block's activations are freed when it is done.")
        self._warn_of_the_early_rate()
        self.add_callback(_ZeroHeadGradients(self.local_heads))
        self._reducer = GradientReducer()
        self._drift = WeightDrift(self._owned()) if args.log_drift else None
        self._owns_output_dir = False

    def add_callback(self, callback: Any) -> None:
        """As the parent's; a callback that logs through its trainer is told which it is."""
        super().add_callback(callback)
        bind_callbacks(self.callback_handler.callbacks, self)

    def _make_objective(self, base_model: PreTrainedModel) -> LocalObjective:
        args: LocalLearningArguments = self.args
        if args.local_objective == "readout":
            return ReadoutObjective.from_model(base_model)
        return ReconstructionObjective(args.reconstruction_bottleneck, masked=args.reconstruction_mask == "attention")

    def _local_weight(self) -> float:
        """The factor of each early block's loss."""
        if isinstance(self._objective, ReadoutObjective):
            return 1.0  # ZeroLock: a block learns the next token as the last one does
        return self.args.reconstruction_weight / (len(self.blocks) - 1)

    def _device_of(self, block: Block) -> torch.device:
        """Where a block ends: a model may be spread over devices, or not yet be on its own (FSDP)."""
        device = next(self.stack.layers[block.stop - 1].parameters()).device
        return self.args.device if device.type in ("cpu", "meta") else device

    def _check_trainable(self) -> None:
        owned = self._owned()
        for block in self.early_blocks:
            trainable = any(parameter.requires_grad for parameter in owned[block.index].values())
            if self.args.train_early_blocks and not trainable:
                raise ValueError(
                    f"train_early_blocks=True, but no parameter of block {block.index} (layers {block.start} to "
                    f"{block.stop - 1}) is trainable, as after freezing it or with an adapter on later layers only; "
                    "set train_early_blocks to False, or make parameters of the block trainable."
                )
        if self.optimizer is not None and self.args.early_learning_rate is not None:
            raise ValueError(
                f"early_learning_rate={self.args.early_learning_rate} has no effect on an optimizer of your own; give "
                "the early blocks a parameter group with that rate, and leave early_learning_rate unset."
            )

    def _warn_of_the_early_rate(self) -> None:
        """The paper's one rate for all blocks undoes what the early ones knew if none of its steps is rounded away."""
        args: LocalLearningArguments = self.args
        is_adapter = isinstance(self.model, PeftModel)
        if args.early_learning_rate is None and self.optimizer is None and args.train_early_blocks and not is_adapter:
            if any(p.dtype == torch.float32 and p.requires_grad for p in self._early_parameters()):
                logger.warning(
                    f"early_learning_rate is unset, so the early blocks learn at learning_rate={args.learning_rate:g} "
                    "as in the paper. In fp32 weights that can undo what they knew, since AdamW's step does not "
                    f"shrink with their small gradient. Consider early_learning_rate={args.learning_rate / 10:g}; "
                    "measured in recipes/smollm2-135m."
                )

    def _check_fsdp(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing=True runs the decoder layers' hooks a second time in the backward; set "
                "it to false and use activation_checkpointing=True, which does not."
            )
        if plugin is not None and plugin.fsdp_version == 1 and self.args.clip_scope == "block":
            raise ValueError("clip_scope='block' needs FSDP2; set fsdp_version to 2, or clip_scope to 'global'.")

    # ---- What belongs to which block ----

    def _base_model(self) -> PreTrainedModel:
        model = self.accelerator.unwrap_model(self.model)
        return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)

    def _early_blocks_here(self) -> list[Block]:
        """The early blocks that run in this process: all of them, unless a trainer runs a part of the model."""
        return self.blocks[:-1]

    def _owned(self) -> list[dict[str, nn.Parameter]]:
        return parameters_by_block(self.accelerator.unwrap_model(self.model), self.stack, self.blocks)

    def _early_parameters(self) -> list[nn.Parameter]:
        return [parameter for block in self._owned()[:-1] for parameter in block.values()]

    def _clip_groups(self) -> list[list[nn.Parameter]]:
        """For each block the parameters whose gradients are clipped together: its own and its head's."""
        groups = [[p for n, p in block.items() if ".local_heads." not in f".{n}"] for block in self._owned()]
        for index, head in self.local_heads.items():
            groups[int(index)].extend(head.parameters())
        return groups

    def _separate_embeddings(self, base_model: PreTrainedModel) -> None:
        embeddings, head = base_model.get_input_embeddings(), base_model.get_output_embeddings()
        if head.weight is not embeddings.weight or not head.weight.requires_grad:
            return
        if self.args.tied_embeddings == "freeze":
            head.weight.requires_grad_(False)
        elif is_deepspeed_zero3_enabled():
            raise ValueError(
                "tied_embeddings='untie' does not work under DeepSpeed ZeRO-3, which has already sharded the weight "
                "to copy; set it to 'freeze', or use ZeRO-2."
            )
        else:
            untie_output_embeddings(base_model)

    def _router_coefficient(self) -> float:
        config = self._base_model().config.get_text_config(decoder=True).to_dict()
        return config.get("router_aux_loss_coef", 0.0) if config.get("output_router_logits", False) else 0.0

    # ---- The local backward ----

    def _run_local_backward(self, index: int, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)
        if self._reduces_early_gradients() and self.accelerator.sync_gradients:
            self._reducer.start(self._clip_groups()[index])

    def _reduces_early_gradients(self) -> bool:
        return self.accelerator.num_processes > 1 and not self._heads_in_model

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        steps = self.current_gradient_accumulation_steps
        update = self.args.train_early_blocks and self.state.global_step % self.args.local_update_interval == 0
        with self.boundary.training_forward(self._run_local_backward, 1 / steps, update, inputs):
            result: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.boundary.check_task_loss(result[0] if return_outputs else result)
        joint_loss = self.boundary.joint_loss()
        if joint_loss is None:
            return result
        # As TRL scales the auxiliary loss of MoE models: with `num_items_in_batch` Trainer leaves it to the loss.
        joint_loss = joint_loss / steps if num_items_in_batch is not None else joint_loss
        return (result[0] + joint_loss, result[1]) if return_outputs else result + joint_loss

    def _log_local_losses(self) -> None:
        if not any(self.boundary.losses.values()):
            return
        device = self.args.device
        losses = torch.stack([torch.stack(block).mean().to(device) for block in self.boundary.losses.values()])
        values = self.accelerator.reduce(losses, reduction="mean").tolist()
        for index, value in zip(self.boundary.losses, values, strict=True):
            self._check_finite(f"local_loss/block_{index}", value)
            self._metrics["train"][f"local_loss/block_{index}"].append(value)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._check_finite("loss", loss.item())
        self._log_local_losses()
        return loss

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {self.state.global_step + 1}. Training stops before this step changes the "
                f"weights; the checkpoints in output_dir={self.args.output_dir!r} are from before. Lower "
                "learning_rate or early_learning_rate, or raise warmup_steps, and resume."
            )

    # ---- Clipping and the optimizer ----

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor | float:
        return self._clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> Any:
        norm = self._clip(math.inf) if grad_norm is None else grad_norm
        # A gradient scaler skips the step by itself.
        if norm is not None and self.accelerator.scaler is None:
            self._check_finite("grad_norm", float(norm))
        return norm

    def _clip(self, max_norm: float) -> Any:
        """Clips the gradients as `clip_scope` says; returns the norm of all of them before."""
        if self._reduces_early_gradients() and self.boundary.mode == "joint":
            self._reducer.start([parameter for group in self._clip_groups()[:-1] for parameter in group])
        self._reducer.wait()
        if self.args.clip_scope == "global":
            heads = [] if self._heads_in_model else self.local_heads.parameters()
            return self.accelerator.clip_grad_norm_([*self.model.parameters(), *heads], max_norm)
        self.accelerator.unscale_gradients()
        norms = [clip_grad_norm_(group, max_norm) for group in self._clip_groups()]
        full_norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        return torch.linalg.vector_norm(torch.stack([norm.to(self.args.device) for norm in full_norms]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        target = self.model if model is None else model
        with contextlib.nullcontext() if self._heads_in_model else _registered(target, self.local_heads):
            is_new = self.optimizer is None
            optimizer = super().create_optimizer(model)
        present = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        missing = [parameter for parameter in self.local_heads.parameters() if id(parameter) not in present]
        if missing:  # an optimizer of the user's own
            optimizer.param_groups[0]["params"].extend(missing)  # not a new group: a scheduler may know the groups
        if is_new and self.args.early_learning_rate is not None:
            early = {id(parameter) for group in self._clip_groups()[:-1] for parameter in group}
            _set_learning_rate(optimizer, early, self.args.early_learning_rate)
        return optimizer

    # ---- The run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if not self._owns_output_dir:
            check_output_dir(self.args.output_dir, resume_from_checkpoint)
        self._owns_output_dir = True
        output_dir = self.args.output_dir
        checkpoint = get_last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if checkpoint:
            self._resumed = read_local_state(checkpoint, self._block_settings())
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, Any]:
        # The early blocks' gradients are ready inside the forward, or do not follow from the forward's output; DDP's
        # reducer would wait for them, or see them twice. `GradientReducer` averages them instead.
        with ignored_by_ddp(self.model, [name for block in self._owned()[:-1] for name in block]):
            prepared = super()._prepare_for_training(*args, **kwargs)
        if self._reduces_early_gradients():
            self._synchronise_start()
        return prepared

    def _synchronise_start(self) -> None:
        """Gives all ranks the same start of what DDP does not broadcast."""
        broadcast_parameters([*self._early_parameters(), *self.local_heads.parameters()])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._drift is not None and self.model.training:
            for index, drift in enumerate(self._drift.measure(self._owned())):
                self._metrics["train"][f"drift/block_{index}"].append(drift)
        super().log(logs, start_time)

    # ---- Checkpoints ----

    def _block_settings(self) -> dict[str, Any]:
        return {
            "num_blocks": len(self.blocks),
            "split_at": [block.start for block in self.blocks[1:]],
            "local_objective": type(self._objective).__name__,
            "readout": self._objective.fingerprint if isinstance(self._objective, ReadoutObjective) else None,
            "reconstruction_bottleneck": self.args.reconstruction_bottleneck,
            "tied_embeddings": self.args.tied_embeddings,
            "train_early_blocks": self.args.train_early_blocks,
            "has_early_learning_rate": self.args.early_learning_rate is not None,
        }

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None) -> None:
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if ".local_heads." not in f".{k}"}
        super()._save(output_dir, state_dict)


class _ZeroHeadGradients(TrainerCallback):
    """Does for the heads what the training loop's `model.zero_grad()` does for the model's parameters."""

    def __init__(self, heads: nn.ModuleDict) -> None:
        self.heads = heads

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.heads.zero_grad()


@contextlib.contextmanager
def _registered(model: nn.Module, heads: nn.ModuleDict) -> Any:
    """Lets the parent find the heads among the model's parameters while it makes the optimizer."""
    model.add_module("local_heads", heads)
    try:
        yield
    finally:
        del model._modules["local_heads"]


def _set_learning_rate(optimizer: torch.optim.Optimizer, members: set[int], learning_rate: float) -> None:
    """Moves some parameters, given by `id`, to groups of their own that have another learning rate."""
    for group in list(optimizer.param_groups):
        chosen = [parameter for parameter in group["params"] if id(parameter) in members]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in members]
            optimizer.add_param_group({**group, "params": chosen, "lr": learning_rate})
