"""What MLAAN makes before training: the losses' readout, and an auxiliary for each early block."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from lopt_hf.local.blocks import DecoderStack
from lopt_hf.local.methods.mlaan.auxiliary import LeapAuxiliary
from lopt_hf.local.methods.mlaan.calibration import Calibration
from lopt_hf.local.methods.mlaan.leaps import check_leaps, even_leaps, last_leaps, leap_counts
from lopt_hf.local.methods.mlaan.memory import check_memory, planned_bytes
from lopt_hf.local.methods.mlaan.readouts import MovingReadoutObjective, TrainableReadoutObjective
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.mlaan.config import MLAANArguments
from lopt_hf.trainers.lopt_mixin import LoPTMixin

__all__ = ["MAX_LOGITS", "AuxiliarySetupMixin", "averaged_leaps", "make_auxiliary"]

logger = logging.get_logger(__name__)

# Ours: batches on which leaps are chosen and the loss at the start is measured.
MEASURED_BATCHES = 4

# Ours: 16 MiB of fp32 logits, a quarter of what LoPT's readout takes: they come on top of a window's activations.
MAX_LOGITS = 2**22


class AuxiliarySetupMixin(LoPTMixin):
    """Makes, calibrates and measures the auxiliaries; `MLAANMixin` trains with them."""

    start_losses: dict[str, float]  # the model's and each auxiliary's loss before training, in nats per token
    _own_names: frozenset[str] = frozenset()  # of the auxiliaries' weights that they do not share with the model

    def _make_objective(self, base_model: PreTrainedModel) -> LocalObjective:
        if self.args.readout == "ema":
            return MovingReadoutObjective(base_model)
        if self.args.readout == "trainable":
            return TrainableReadoutObjective(base_model)
        return ReadoutObjective.from_model(base_model, max_logits=MAX_LOGITS)

    def _make_local_heads(self, base_model: PreTrainedModel) -> nn.ModuleDict:
        args: MLAANArguments = self.args
        if args.window == len(self.blocks):
            self._say(f"window={args.window} is num_blocks: the task loss trains all blocks, as end-to-end does.")
            return nn.ModuleDict()
        if not self.early_blocks:
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
        of_model = {id(parameter) for parameter in base_model.parameters()}
        self._own_names = frozenset(n for n, p in heads.named_parameters() if id(p) not in of_model)
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
        if self._given_leaps(stop) is not None or count == 0 or self.args.leap != "calibrate":
            return self._planned_leaps(stop, count)
        return calibration.choose(stop, count, lambda leaps: self._make_auxiliary(base_model, stop, leaps))

    def _planned_leaps(self, stop: int, count: int) -> list[int]:
        """The leapt layers behind a block; where calibration chooses them, as many others."""
        given = self._given_leaps(stop)
        num_layers = len(self.stack.layers)
        if given is not None:
            return given
        if count == 0 or self.args.leap == "last":
            return last_leaps(num_layers, count)
        return even_leaps(stop, num_layers, count)

    def _given_leaps(self, stop: int) -> list[int] | None:
        index = next(block.index for block in self.blocks if block.stop == stop)
        given = None if self.args.leap_layers is None else self.args.leap_layers[index]
        return given if isinstance(given, list) else None

    def _make_auxiliary(self, base_model: PreTrainedModel, stop: int, leaps: Sequence[int]) -> LeapAuxiliary:
        block = next(block for block in self.blocks if block.stop == stop)
        averaged = self._averaged(stop, leaps)
        return make_auxiliary(base_model, self.stack, stop, leaps, averaged, self.args).to(self._device_of(block))

    def _averaged(self, stop: int, leaps: Sequence[int]) -> list[int]:
        """The leapt layers behind a block, which ends before layer `stop`, with a moving average beside them."""
        return averaged_leaps(leaps, self.args)

    def _memory_line(self, base_model: PreTrainedModel, counts: Sequence[int]) -> str:
        args: MLAANArguments = self.args
        head = base_model.get_output_embeddings().weight
        num_trained = len(self.early_blocks) if args.readout == "trainable" else 0
        leaps = {block.stop: self._planned_leaps(block.stop, counts[block.index]) for block in self.early_blocks}
        planned = planned_bytes(
            self.stack.layers,
            leaps.values(),
            averaged=[self._averaged(stop, indices) for stop, indices in leaps.items()],
            readout=(head.numel() * head.element_size(), num_trained),
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


def averaged_leaps(leaps: Sequence[int], args: MLAANArguments | type[MLAANArguments]) -> list[int]:
    """The leapt layers with a moving average beside them, as the arguments say."""
    return list(leaps[:1] if args.ema_layers == "first" else leaps)


def make_auxiliary(
    model: PreTrainedModel,
    stack: DecoderStack,
    stop: int,
    leaps: Sequence[int],
    averaged: Sequence[int],
    args: MLAANArguments | type[MLAANArguments],
) -> LeapAuxiliary:
    """Makes the auxiliary of one early block, as its arguments say.

    Args:
        model: The model (of a `PeftModel`, its base model).
        stack: Its decoder.
        stop: First layer behind the block.
        leaps: Indices of the leapt layers, in order.
        averaged: Those of them with a moving average beside them.
        args: The arguments; the class itself has their defaults.
    """
    return LeapAuxiliary(
        model,
        stack.layers,
        leaps,
        averaged=averaged,
        combine="mean" if args.combine == "mean" else "sum",
        hidden_size=stack.hidden_size,
        stop=stop if args.translator == "calibrated" else None,
        checkpointing=args.auxiliary_checkpointing,
    )


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
