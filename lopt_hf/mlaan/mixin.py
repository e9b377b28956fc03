"""MLAAN for any TRL trainer whose loss is the next token's."""

import weakref
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerCallback

from lopt_hf.local.methods.mlaan.auxiliary import LeapAuxiliary
from lopt_hf.local.methods.mlaan.readouts import MovingReadoutObjective
from lopt_hf.local.readout import IGNORED_LABEL
from lopt_hf.local.windows import WindowBoundary
from lopt_hf.mlaan.config import MLAANArguments
from lopt_hf.mlaan.setup import AuxiliarySetupMixin

__all__ = ["MLAAN_PAPER", "MLAANMixin"]

MLAAN_PAPER = {
    "title": "MLAAN: Scaling Supervised Local Learning with Multilaminar Leap Augmented Auxiliary Network",
    "id": "2406.16633",
    # docstyle-ignore
    "citation": """\
@inproceedings{zhang2025mlaan,
    title     = {{MLAAN: Scaling Supervised Local Learning with Multilaminar Leap Augmented Auxiliary Network}},
    author    = {Zhang, Yuming and Zhang, Shouxin and Wang, Peizhe and Zhu, Feiyu and others},
    booktitle = {AAAI Conference on Artificial Intelligence},
    year      = 2025,
    eprint    = {arXiv:2406.16633},
}""",
}


class MLAANMixin(AuxiliarySetupMixin):
    """Adds MLAAN to a TRL trainer; put it before the trainer in the list of base classes.

    The config class must mix in `MLAANArguments` in the same way. With respect to `LoPTMixin`, the early blocks learn
    the next token through auxiliaries, and a loss reaches a window of blocks.

    Raises:
        ValueError: If the model has no single decoder stack, if leaps don't fit it, or if the auxiliaries need more
            memory than the device has.
    """

    boundary: WindowBoundary

    def __init__(self, *trainer_args: Any, **trainer_kwargs: Any) -> None:
        self.start_losses = {}
        super().__init__(*trainer_args, **trainer_kwargs)
        self.add_callback(_AfterEachStep(self))

    def _make_boundary(self, base_model: PreTrainedModel) -> WindowBoundary:
        args: MLAANArguments = self.args
        return WindowBoundary(
            base_model,
            self.blocks,
            self._objective,
            self.local_heads,
            window=args.window,
            weights=args.loss_weights,
            task_share=args.task_share,
            router_coefficient=self._router_coefficient(),
            walls=self._walls(),
            early_blocks=self.early_blocks,
        )

    def _walls(self) -> list[int]:
        """Blocks before which no window begins that ends with them or later."""
        return []

    def _separate_embeddings(self, base_model: PreTrainedModel) -> None:
        if self.args.window < len(self.blocks):  # the task loss reaches both otherwise, as in end-to-end training
            super()._separate_embeddings(base_model)

    def _check_trainable(self) -> None:
        owned = self._owned()
        for block in self.early_blocks:
            if not any(parameter.requires_grad for parameter in owned[block.index].values()):
                raise ValueError(
                    f"num_blocks={self.args.num_blocks}: no parameter of block {block.index} (layers {block.start} to "
                    f"{block.stop - 1}) is trainable, as after freezing it or with an adapter on later layers only; "
                    "make parameters of the block trainable, or lower num_blocks."
                )
        self._check_early_rate()

    def _warn_of_the_early_rate(self) -> None:
        """Nothing: the early blocks' loss is the task's here."""

    # ---- The step ----

    def _local_scale(self, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None) -> float:
        """Each token weighs the same as in the task loss, however many of the step's tokens the micro-batch has."""
        labels_BT = inputs.get("labels")
        if num_items_in_batch is None or labels_BT is None:
            return super()._local_scale(inputs, num_items_in_batch)
        counted = (labels_BT[:, 1:] != IGNORED_LABEL).sum()
        return float(counted / num_items_in_batch * self._num_counted_processes())

    def _num_counted_processes(self) -> int:
        """Over how many processes the tokens of a step are counted, and their gradients averaged."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _run_local_backward(self, index: int, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def _average_gradients(self, index: int) -> None:
        if self._reduces_early_gradients() and self.accelerator.sync_gradients:
            self._reducer.start(self._learners()[index])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.boundary.trains_blocks = self.state.global_step >= self.args.auxiliary_warmup_steps
        self.boundary.when_done = self._average_gradients
        try:
            loss = super().training_step(*args, **kwargs)
            self.boundary.finish(self._run_local_backward)
        finally:
            self.boundary.when_done = None
            self.boundary.reset()
        return loss

    def _log_local_losses(self) -> None:
        if self.boundary.window_losses:
            self._log_losses(self.boundary.window_losses)

    def _auxiliaries(self) -> dict[str, LeapAuxiliary]:
        return {index: cast(LeapAuxiliary, head) for index, head in self.local_heads.items()}

    def _update_averages(self) -> None:
        for auxiliary in self._auxiliaries().values():
            auxiliary.update_averages(self.stack.layers, self.args.ema_decay)
        if isinstance(self._objective, MovingReadoutObjective):
            self._objective.update(self.args.ema_decay)

    # ---- Checkpoints ----

    def _block_settings(self) -> dict[str, Any]:
        args: MLAANArguments = self.args
        names = ["window", "combine", "ema_layers", "ema_decay", "translator", "readout", "tied_embeddings"]
        names += ["independent_weight", "cascaded_weight", "auxiliary_warmup_steps"]
        return {
            "method": "MLAAN",
            "num_blocks": len(self.blocks),
            "split_at": [block.start for block in self.blocks[1:]],
            "leap_layers": {index: list(made.leaps) for index, made in self._auxiliaries().items()},
            **{name: getattr(args, name) for name in names},
            "has_early_learning_rate": args.early_learning_rate is not None,
        }

    def _heads_state(self) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.local_heads.state_dict().items() if name in self._own_names}

    def _load_heads_state(self, state: dict[str, torch.Tensor]) -> None:
        missing = self._heads_state().keys() - state.keys()
        if missing:
            raise ValueError(f"resume_from_checkpoint: {min(missing)!r} is missing in the saved auxiliaries.")
        self.local_heads.load_state_dict(state, strict=False)


class _AfterEachStep(TrainerCallback):
    """Updates the averages after every optimizer step, and logs the losses at the start."""

    def __init__(self, trainer: MLAANMixin) -> None:
        self._trainer = weakref.ref(trainer)  # the trainer holds the callback

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is not None and trainer.start_losses and state.global_step == 0:
            trainer.log({f"local_loss/{name}/start": loss for name, loss in trainer.start_losses.items()})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self._trainer()
        if trainer is not None:
            trainer._update_averages()
