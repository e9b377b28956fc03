"""What MLAAN makes before training: the early blocks' auxiliaries, calibrated on some training data."""

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.blocks import Block
from lopt_hf.local.methods.base import Learner
from lopt_hf.local.methods.mlaan.arguments import MLAANSettings
from lopt_hf.local.methods.mlaan.auxiliary import LeapAuxiliary
from lopt_hf.local.methods.mlaan.calibration import Calibration
from lopt_hf.local.methods.mlaan.leaps import check_leaps, even_leaps, last_leaps, leap_counts
from lopt_hf.local.methods.mlaan.memory import check_memory, planned_bytes
from lopt_hf.local.methods.mlaan.readouts import MovingReadoutObjective, TrainableReadoutObjective
from lopt_hf.local.objectives import LocalObjective
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.local.stacks import DecoderStack

__all__ = ["MAX_LOGITS", "AuxiliarySetup"]

# Ours: batches on which leaps are chosen and the loss at the start is measured.
MEASURED_BATCHES = 4

# Ours: 16 MiB of fp32 logits, a quarter of what LoPT's readout takes: they come on top of a window's activations.
MAX_LOGITS = 2**22


class AuxiliarySetup:
    """Makes the auxiliaries of a learner's early blocks, and measures where their losses start.

    Attributes:
        start_losses: The model's and each auxiliary's loss before training, in nats per token; empty where nothing is
            calibrated.

    Args:
        learner: The learner, before it has heads. Without `calibration_batches` the leapt layers are
            those that the arguments plan, translators stay the identity, and nothing is measured.
        objective: The loss of hidden states.
    """

    def __init__(self, learner: Learner, objective: LocalObjective) -> None:
        self.learner = learner
        self.model: PreTrainedModel = learner.base_model
        self.stack: DecoderStack = learner.stack
        self.settings: MLAANSettings = learner.settings
        self.objective = objective
        self.start_losses: dict[str, float] = {}

    def make(self) -> dict[int, nn.Module]:
        """Makes the auxiliaries, by block index.

        Raises:
            ValueError: If the leaps don't fit the model, or the auxiliaries do not fit into the device's memory.
        """
        blocks, early = self.learner.blocks, self.learner.early_blocks
        if self.settings.leap_layers is not None:
            check_leaps(self.settings.leap_layers, blocks)
        counts = {block.stop: count for block, count in zip(blocks[:-1], self._leap_counts(), strict=True)}
        if self.learner.calibration_batches is None:
            made = {
                block.stop: self.make_auxiliary(block.stop, self._planned_leaps(block.stop, counts[block.stop]))
                for block in early
            }
        else:
            made = self._make_calibrated(counts)
        self._add_readouts(list(made.values()))
        return {block.index: made[block.stop] for block in early}

    def _make_calibrated(self, counts: dict[int, int]) -> dict[int, LeapAuxiliary]:
        early, say = self.learner.early_blocks, self.learner.say
        self._check_one_device()
        say(self._memory_line(counts))
        with self.learner.autocast():
            calibration = self.make_calibration()
            chosen = {block.stop: self._choose(calibration, block.stop, counts[block.stop]) for block in early}
            made = {stop: self.make_auxiliary(stop, leaps) for stop, leaps in chosen.items()}
            calibration.fit(made.values())
            self._measure_start(calibration, made)
        return made

    def _check_one_device(self) -> None:
        devices = {str(parameter.device) for parameter in self.model.parameters()}
        if len(devices) > 1:
            raise ValueError(
                f"model is spread over the devices {', '.join(sorted(devices))}; an auxiliary runs copies of later "
                "layers behind earlier ones, so load the model without a device_map, on one device."
            )

    def _leap_counts(self) -> list[int]:
        given = self.settings.leap_layers
        if given is None:
            return leap_counts(self.learner.blocks, self.settings.leap_share)
        return [entry if isinstance(entry, int) else len(entry) for entry in given]

    def _choose(self, calibration: Calibration, stop: int, count: int) -> list[int]:
        if self._given_leaps(stop) is not None or count == 0 or self.settings.leap != "calibrate":
            return self._planned_leaps(stop, count)
        return calibration.choose(stop, count, lambda leaps: self.make_auxiliary(stop, leaps))

    def _planned_leaps(self, stop: int, count: int) -> list[int]:
        """The leapt layers behind a block; where calibration chooses them, as many others."""
        given = self._given_leaps(stop)
        num_layers = len(self.stack.layers)
        if given is not None:
            return given
        if count == 0 or self.settings.leap == "last":
            return last_leaps(num_layers, count)
        return even_leaps(stop, num_layers, count)

    def _given_leaps(self, stop: int) -> list[int] | None:
        index = next(block.index for block in self.learner.blocks if block.stop == stop)
        given = None if self.settings.leap_layers is None else self.settings.leap_layers[index]
        return given if isinstance(given, list) else None

    def make_auxiliary(self, stop: int, leaps: Sequence[int]) -> LeapAuxiliary:
        """Makes the auxiliary of the block that ends before layer `stop`, with these leapt layers, in order."""
        block = next(block for block in self.learner.blocks if block.stop == stop)
        made = LeapAuxiliary(
            self.model,
            self.stack.layers,
            leaps,
            averaged=self._averaged(block, leaps),
            combine="mean" if self.settings.combine == "mean" else "sum",
            hidden_size=self.stack.hidden_size,
            stop=stop if self.settings.translator == "calibrated" else None,
            checkpointing=self.settings.auxiliary_checkpointing,
        )
        self.learner.place(made, block)
        return made

    def _averaged(self, block: Block, leaps: Sequence[int]) -> list[int]:
        """The leapt layers with a moving average beside them; of a pipeline's layers only those of the block's stage.

        What later stages learn does not travel backwards, so the copy of a layer of theirs trains alone.
        """
        chosen = leaps[:1] if self.settings.ema_layers == "first" else leaps
        return [index for index in chosen if index < self.learner.stage_stop(block)]

    def _memory_line(self, counts: dict[int, int]) -> str:
        head = self.model.get_output_embeddings().weight
        early = self.learner.early_blocks
        leaps = [self._planned_leaps(block.stop, counts[block.stop]) for block in early]
        planned = planned_bytes(
            self.stack.layers,
            leaps,
            averaged=[self._averaged(block, indices) for block, indices in zip(early, leaps, strict=True)],
            readout=(head.numel() * head.element_size(), len(early) if self.settings.readout == "trainable" else 0),
            translator=4 * self.stack.hidden_size**2 if self.settings.translator == "calibrated" else 0,
        )
        return check_memory(planned, self.learner.device_of(self.learner.blocks[0]))

    def make_calibration(self) -> Calibration:
        """Makes what runs the stock model over the calibration batches."""
        assert self.learner.calibration_batches is not None
        batches = []
        tokens = 0
        for number, batch in enumerate(self.learner.calibration_batches()):
            batches.append(batch)
            tokens += batch["input_ids"].numel() if number >= MEASURED_BATCHES else 0
            if tokens >= self.settings.calibration_tokens:
                break
        frozen = isinstance(self.objective, ReadoutObjective)
        objective = self.objective if frozen else ReadoutObjective.from_model(self.model)
        fitted = batches[MEASURED_BATCHES:] or batches  # of a data set that small
        return Calibration(self.model, objective, fitted, batches[:MEASURED_BATCHES])

    def _measure_start(self, calibration: Calibration, made: dict[int, LeapAuxiliary]) -> None:
        whole, losses = calibration.losses(made)
        self.start_losses = {"model": whole}
        for block in self.learner.early_blocks:
            loss, leaps = losses[block.stop], list(made[block.stop].leaps)
            self.start_losses[f"block_{block.index}"] = loss
            self.learner.say(
                f"Block {block.index} (layers {block.start} to {block.stop - 1}) learns through layers {leaps}: its "
                f"local loss starts at {loss:.3f} nats per token, the model's own is {whole:.3f}."
            )

    def _add_readouts(self, auxiliaries: Sequence[LeapAuxiliary]) -> None:
        """Registers readouts that train or move with the auxiliaries, so that a checkpoint has their weights."""
        if isinstance(self.objective, TrainableReadoutObjective):
            for auxiliary in auxiliaries:
                auxiliary.readout = self.objective.make_head(self.stack.hidden_size)
        elif isinstance(self.objective, MovingReadoutObjective):
            auxiliaries[0].readout = self.objective.readout
