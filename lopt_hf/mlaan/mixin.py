"""MLAAN for any TRL trainer whose loss is the next token's."""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import logging

from lopt_hf.mlaan.auxiliary import LeapAuxiliary
from lopt_hf.mlaan.calibration import Calibration
from lopt_hf.mlaan.config import MLAANArguments
from lopt_hf.mlaan.leaps import check_leaps, even_leaps, last_leaps, leap_counts
from lopt_hf.mlaan.memory import check_memory, planned_bytes
from lopt_hf.mlaan.readouts import MovingReadoutObjective, TrainableReadoutObjective
from lopt_hf.mlaan.windows import WindowBoundary
from lopt_hf.objectives import LocalObjective
from lopt_hf.readout import IGNORED_LABEL, ReadoutObjective
from lopt_hf.trainers.lopt_mixin import LoPTMixin

__all__ = ["MLAAN_PAPER", "MLAANMixin"]

logger = logging.get_logger(__name__)

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

# Ours: batches on which leaps are chosen and the loss at the start is measured, and rows in each batch.
MEASURED_BATCHES = 4


class MLAANMixin(LoPTMixin):
    """Adds MLAAN to a TRL trainer; put it before the trainer in the list of base classes.

    The config class must mix in `MLAANArguments` in the same way. With respect to `LoPTMixin`, the early blocks learn
    the next token through auxiliaries, and a loss reaches a window of blocks.

    Raises:
        ValueError: If the model has no single decoder stack, if leaps don't fit it, or if the auxiliaries need more
            memory than the device has.
    """

    boundary: WindowBoundary
    start_losses: dict[str, float]  # the model's and each auxiliary's loss before training, in nats per token

    def __init__(self, *trainer_args: Any, **trainer_kwargs: Any) -> None:
        self.start_losses = {}
        super().__init__(*trainer_args, **trainer_kwargs)
        self.add_callback(_AfterEachStep(self))

    # ---- What is made before training ----

    def _make_objective(self, base_model: PreTrainedModel) -> LocalObjective:
        if self.args.readout == "ema":
            return MovingReadoutObjective(base_model)
        if self.args.readout == "trainable":
            return TrainableReadoutObjective(base_model)
        return ReadoutObjective.from_model(base_model)

    def _make_local_heads(self, base_model: PreTrainedModel) -> nn.ModuleDict:
        args: MLAANArguments = self.args
        if args.window == len(self.blocks):
            self._say(f"window={args.window} is num_blocks: the task loss trains all blocks, as end-to-end does.")
            return nn.ModuleDict()
        if args.leap_layers is not None:
            check_leaps(args.leap_layers, self.blocks)
        counts = self._leap_counts()
        self._check_one_device(base_model)
        self._say(self._memory_line(base_model, counts))
        learning = {block.stop: block.index for block in self.early_blocks}
        with self.accelerator.autocast():
            calibration = self._make_calibration(base_model)
            chosen = {stop: self._choose(base_model, calibration, stop, counts[i]) for stop, i in learning.items()}
            made = {stop: self._make_auxiliary(base_model, stop, leaps) for stop, leaps in chosen.items()}
            calibration.fit(made.values())
            self._measure_start(calibration, made)
        self._add_readouts(list(made.values()))
        heads = nn.ModuleDict({str(index): made[stop] for stop, index in learning.items()})
        return heads.train()

    def _say(self, line: str) -> None:
        if self.accelerator.is_main_process:
            logger.warning(line)  # what nobody asked for, but must know; the level is what is shown by default

    def _check_one_device(self, base_model: PreTrainedModel) -> None:
        devices = {str(parameter.device) for parameter in base_model.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"model is spread over the devices {', '.join(sorted(devices))}; an auxiliary runs copies of later "
                "layers behind earlier ones, so load the model without a device_map, on one device."
            )

    def _leap_counts(self) -> list[int]:
        given = self.args.leap_layers
        if given is None:
            return leap_counts(self.blocks, self.args.leap_share)
        return [entry if isinstance(entry, int) else len(entry) for entry in given]

    def _choose(self, base_model: PreTrainedModel, calibration: Calibration, stop: int, count: int) -> list[int]:
        index = next(block.index for block in self.blocks if block.stop == stop)
        given = None if self.args.leap_layers is None else self.args.leap_layers[index]
        num_layers = len(self.stack.layers)
        if isinstance(given, list):
            return given
        if count == 0 or self.args.leap == "last":
            return last_leaps(num_layers, count)
        if self.args.leap == "even":
            return even_leaps(stop, num_layers, count)
        return calibration.choose(stop, count, lambda leaps: self._make_auxiliary(base_model, stop, leaps))

    def _make_auxiliary(self, base_model: PreTrainedModel, stop: int, leaps: Sequence[int]) -> LeapAuxiliary:
        args: MLAANArguments = self.args
        block = next(block for block in self.blocks if block.stop == stop)
        auxiliary = LeapAuxiliary(
            base_model,
            self.stack.layers,
            leaps,
            num_averaged=min(1, len(leaps)) if args.ema_layers == "first" else len(leaps),
            combine="mean" if args.combine == "mean" else "sum",
            hidden_size=self.stack.hidden_size,
            stop=stop if args.translator == "calibrated" else None,
            checkpointing=args.auxiliary_checkpointing,
        )
        return auxiliary.to(self._device_of(block))

    def _memory_line(self, base_model: PreTrainedModel, counts: Sequence[int]) -> str:
        args: MLAANArguments = self.args
        num_layers = len(self.stack.layers)
        head = base_model.get_output_embeddings().weight
        planned = planned_bytes(
            self.stack.layers,
            [last_leaps(num_layers, count) for count in counts],
            num_averaged=1 if args.ema_layers == "first" else num_layers,
            readout=(head.numel() * head.element_size(), len(counts) if args.readout == "trainable" else 0),
            translator=4 * self.stack.hidden_size**2 if args.translator == "calibrated" else 0,
        )
        return check_memory(planned, self._device_of(self.blocks[0]))

    def _make_calibration(self, base_model: PreTrainedModel) -> Calibration:
        batches = list(self._calibration_batches())
        frozen = isinstance(self._objective, ReadoutObjective)
        objective = self._objective if frozen else ReadoutObjective.from_model(base_model)
        fitted = batches[MEASURED_BATCHES:] or batches  # of a data set that small
        return Calibration(base_model, objective, fitted, batches[:MEASURED_BATCHES])

    def _calibration_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of training rows spread over the data set; neither their order nor the random state is touched."""
        dataset = self.train_dataset
        size = self.args.per_device_train_batch_size
        tokens = 0
        with torch.random.fork_rng(devices=[]):
            for number, rows in enumerate(_spread(dataset, size)):
                batch = self._prepare_inputs(self.data_collator(rows))
                yield batch
                tokens += batch["input_ids"].numel() if number >= MEASURED_BATCHES else 0
                if tokens >= self.args.calibration_tokens:
                    return

    def _measure_start(self, calibration: Calibration, made: dict[int, LeapAuxiliary]) -> None:
        whole, losses = calibration.losses(made)
        self.start_losses = {"model": whole}
        for block in self.early_blocks:
            loss, leaps = losses[block.stop], list(made[block.stop].leaps)
            self.start_losses[f"block_{block.index}"] = loss
            self._say(
                f"Block {block.index} (layers {block.start} to {block.stop - 1}) learns through layers {leaps}: its "
                f"local loss starts at {loss:.3f} nats per token, the model's own is {whole:.3f}."
            )

    def _add_readouts(self, auxiliaries: Sequence[LeapAuxiliary]) -> None:
        """What of the readouts trains or moves belongs to the auxiliaries, which are saved."""
        if isinstance(self._objective, TrainableReadoutObjective):
            for auxiliary in auxiliaries:
                auxiliary.readout = self._objective.make_head(self.stack.hidden_size)
        elif isinstance(self._objective, MovingReadoutObjective):
            auxiliaries[0].readout = self._objective.readout

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
        )

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
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return float(counted / num_items_in_batch * processes)

    def _run_local_backward(self, index: int, loss: torch.Tensor) -> None:
        self.accelerator.backward(loss)

    def _average_gradients(self, index: int) -> None:
        if self._reduces_early_gradients() and self.accelerator.sync_gradients:
            self._reducer.start(self._clip_groups()[index])

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.boundary.trains_blocks = self.state.global_step >= self.args.auxiliary_warmup_steps
        self.boundary.when_done = self._average_gradients
        try:
            loss = super().training_step(*args, **kwargs)
            self.boundary.finish(self._run_local_backward)
        finally:
            self.boundary.when_done = None
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
        of_model = {id(parameter) for parameter in self.accelerator.unwrap_model(self.model).parameters()}
        own = {n for n, p in self.local_heads.named_parameters() if id(p) not in of_model}
        return {name: value for name, value in self.local_heads.state_dict().items() if name in own}

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


def _spread(dataset: Any, size: int) -> Iterator[list[Any]]:
    """Batches of rows: of a data set with a length as far apart as they can be, of a stream the first ones."""
    if isinstance(dataset, IterableDataset):
        rows = iter(dataset)
        while len(batch := [row for row, _ in zip(rows, range(size), strict=False)]) == size:
            yield batch
        return
    assert isinstance(dataset, Dataset)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    for start in range(0, len(order), size):
        yield [dataset[index] for index in order[start : start + size]]
