"""Local learning for any TRL trainer."""

import weakref
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import TrainOutput, get_last_checkpoint
from transformers.utils import logging

from lopt_hf.common.callbacks import bind_callbacks
from lopt_hf.common.distributed import GradientReducer
from lopt_hf.local.blocks import find_decoder_stack, split_layers
from lopt_hf.local.boundary import GradientBoundary, make_heads
from lopt_hf.local.objectives import LocalObjective, ReconstructionObjective
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.meters.drift import WeightDrift
from lopt_hf.trainers.block_optimizer import ZeroHeadGradients
from lopt_hf.trainers.checkpoint import CheckpointMixin, read_local_state
from lopt_hf.trainers.checks import check_output_dir
from lopt_hf.trainers.local_loss import LocalLossMixin
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


class LoPTMixin(LocalLossMixin, CheckpointMixin):
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

    aux_loss_enabled: bool  # TRL's
    router_aux_loss_coef: float  # TRL's

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
        self._objective = local_objective or self._make_objective(base_model)
        self.local_heads = self._make_local_heads(base_model)
        self._heads_in_model = args.sharding_engine is not None
        if self._heads_in_model:  # the engine shards, steps and saves what is in the model. Untested on GPU.
            base_model.add_module("local_heads", self.local_heads)
        self.boundary = self._make_boundary(base_model)
        weakref.finalize(self, self.boundary.remove)
        self._warn_of_the_early_rate()
        self._warn_of_accumulation()
        self.add_callback(ZeroHeadGradients(self.local_heads))
        self._reducer = GradientReducer()
        self._stepped_norms = {}
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

    def _make_local_heads(self, base_model: PreTrainedModel) -> nn.ModuleDict:
        learning = self.early_blocks if self.args.train_early_blocks else []
        heads = make_heads(self._objective, self.stack.hidden_size, self.blocks, self.args.seed, only=learning)
        for block in learning:
            heads[str(block.index)].to(self._device_of(block))
        return heads

    def _make_boundary(self, base_model: PreTrainedModel) -> GradientBoundary:
        args: LocalLearningArguments = self.args
        mode = args.pick_local_backward()
        if args.local_backward == "auto" and mode == "joint":
            logger.warning(
                f"local_backward='auto' is 'joint' under {args.sharding_engine or args.optim}: the early blocks' "
                "activations are kept until the common backward."
            )
        elif args.local_backward == "auto":
            logger.info("local_backward='auto' is 'eager': each block's activations are freed when it is done.")
        return GradientBoundary(
            base_model,
            self.blocks,
            self._objective,
            self.local_heads,
            weight=self._local_weight(),
            mode=mode,
            router_coefficient=self._router_coefficient(),
            early_blocks=self.early_blocks,
        )

    def _local_weight(self) -> float:
        """The factor of each early block's loss."""
        if isinstance(self._objective, ReadoutObjective):
            return 1.0  # ZeroLock: a block learns the next token as the last one does
        return self.args.reconstruction_weight / (len(self.blocks) - 1)

    def _check_fsdp(self) -> None:
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is not None and plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing=True runs the decoder layers' hooks a second time in the backward; set "
                "it to false and use activation_checkpointing=True, which does not."
            )
        if plugin is not None and plugin.fsdp_version == 1 and self.args.clip_scope != "global":
            raise ValueError(
                f"clip_scope={self.args.clip_scope!r} needs FSDP2; set fsdp_version to 2, or clip_scope to 'global'."
            )

    def _router_coefficient(self) -> float:
        return self.router_aux_loss_coef if self.aux_loss_enabled else 0.0

    # ---- The run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        if not self._owns_output_dir:
            check_output_dir(self.args.output_dir, resume_from_checkpoint)
        self._owns_output_dir = True
        output_dir = self.args.output_dir
        checkpoint = get_last_checkpoint(output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        if checkpoint:
            self._resumed = read_local_state(checkpoint, self._block_settings())
        self._stepped_norms.clear()  # of a run that an exception ended
        return super().train(resume_from_checkpoint, *args, **kwargs)

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
