"""Before training: translators fitted in closed form, leapt layers chosen, and the local loss at the start.

Shapes: B batch, T tokens, N tokens that count, D hidden channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.layer_calls import LayerCall, evaluating, layer_inputs, record_layer_calls
from lopt_hf.local.methods.mlaan.auxiliary import Gap, LeapAuxiliary
from lopt_hf.local.methods.mlaan.leaps import calibrated_leaps
from lopt_hf.local.methods.mlaan.translator import TranslatorFit
from lopt_hf.local.objectives import LocalBatch, LocalObjective
from lopt_hf.local.stacks import DecoderStack, find_decoder_stack

__all__ = ["Calibration"]

# What of a batch tells a decoder which tokens stand where; labels and the trainer's own columns are not for it.
_DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds")

# Bounds the memory of the sums: 16 (D + 1)^2 bytes for each gap, 0.3 GB at D = 4096.
GAPS_AT_ONCE = 8

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class _Seen:
    """What one forward of the stock model shows."""

    inputs_BTD: Mapping[int, torch.Tensor]  # of layers; that of index `num_layers` is the last layer's output
    calls: Mapping[int, LayerCall]
    kept_BT: torch.Tensor
    is_first_BT: torch.Tensor


_Pair = tuple[_Seen, Batch]


class Calibration:
    """Runs the stock model over a few batches, without gradients and in evaluation mode.

    Args:
        model: A causal language model (of a `PeftModel`, its base model).
        objective: The loss of hidden states.
        fitted: Micro-batches that translators are fitted to, on the model's device.
        measured: Others, on which losses are measured.
    """

    def __init__(
        self, model: PreTrainedModel, objective: LocalObjective, fitted: Sequence[Batch], measured: Sequence[Batch]
    ) -> None:
        self.model = model
        self.stack: DecoderStack = find_decoder_stack(model)
        self.objective = objective
        self.fitted = fitted
        self.measured = measured

    @torch.no_grad()
    def fit(self, auxiliaries: Iterable[LeapAuxiliary]) -> None:
        """Fits the translators of all auxiliaries, which are changed in place.

        Each maps what the stock model has where its gap begins to what it has where the gap ends, so that the batches
        run once for a number of them; nothing is kept of the batches but sums.
        """
        made = list(auxiliaries)
        gaps = sorted({gap for auxiliary in made for gap in auxiliary.gaps})
        for some in (gaps[start : start + GAPS_AT_ONCE] for start in range(0, len(gaps), GAPS_AT_ONCE)):
            indices = sorted({index for gap in some for index in gap})
            fits = self._fits(some, self._forwards(indices, self.fitted))
            for auxiliary in made:
                auxiliary.calibrate(fits)

    @torch.no_grad()
    def losses(self, auxiliaries: Mapping[int, LeapAuxiliary]) -> tuple[float, dict[int, float]]:
        """The stock model's loss and the auxiliaries' on the same tokens, in nats per token with a label."""
        num_layers = len(self.stack.layers)
        pairs = list(self._forwards([num_layers, *auxiliaries], self.measured))
        whole = self._mean_loss(pairs, num_layers, None)
        return whole, {stop: self._mean_loss(pairs, stop, made) for stop, made in auxiliaries.items()}

    @torch.no_grad()
    def choose(self, stop: int, count: int, make: Callable[[Sequence[int]], LeapAuxiliary]) -> list[int]:
        """The leapt layers with which the loss is lowest at the start, found one after the other.

        Each candidate has its translators fitted to, and its loss measured on, the batches that are measured; the
        states of all deeper layers are kept for them.

        Args:
            stop: First layer behind the block.
            count: How many to choose.
            make: Makes the auxiliary with given leapt layers.
        """
        num_layers = len(self.stack.layers)
        pairs = list(self._forwards(range(stop, num_layers + 1), self.measured))
        fits: dict[Gap, TranslatorFit] = {}

        def measure(leaps: Sequence[int]) -> float:
            auxiliary = make(leaps)
            for gap in fits.keys() - set(auxiliary.gaps):  # the next candidate shares most of this one's
                del fits[gap]
            fits.update(self._fits([gap for gap in auxiliary.gaps if gap not in fits], pairs))
            auxiliary.calibrate(fits)
            return self._mean_loss(pairs, stop, auxiliary)

        return calibrated_leaps(stop, num_layers, count, measure)

    def _fits(self, gaps: Sequence[Gap], pairs: Iterable[_Pair]) -> dict[Gap, TranslatorFit]:
        device = next(self.stack.layers.parameters()).device
        fits = {gap: TranslatorFit(self.stack.hidden_size, device) for gap in gaps}
        for seen, _ in pairs if gaps else ():
            for (begin, end), fit in fits.items():
                h_ND, target_ND = (seen.inputs_BTD[index][seen.kept_BT].float() for index in (begin, end))
                fit.add(h_ND, target_ND, seen.is_first_BT[seen.kept_BT])
        return fits

    def _mean_loss(self, pairs: Sequence[_Pair], stop: int, auxiliary: LeapAuxiliary | None) -> float:
        losses = []
        for seen, batch in pairs:
            h_BTD = seen.inputs_BTD[stop]
            behind_BTD = h_BTD if auxiliary is None else auxiliary(h_BTD, seen.calls)
            losses.append(float(self.objective(nn.Identity(), behind_BTD, h_BTD, LocalBatch(inputs=batch))))
        return sum(losses) / len(losses)

    def _forwards(self, indices: Sequence[int], batches: Sequence[Batch]) -> Iterator[_Pair]:
        for batch in batches:
            yield self._forward(indices, batch), batch

    def _forward(self, indices: Sequence[int], batch: Batch) -> _Seen:
        inputs = {name: batch[name] for name in _DECODER_INPUTS if batch.get(name) is not None}
        with evaluating(self.model):
            calls = record_layer_calls(self.stack, (), inputs)
            with layer_inputs(self.stack.layers, indices) as inputs_BTD:
                self.stack.decoder(**inputs)
        kept_BT, is_first_BT = _tokens(batch, next(iter(inputs_BTD.values())))
        return _Seen(inputs_BTD, calls, kept_BT, is_first_BT)


def _tokens(batch: Mapping[str, Any], h_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens are no padding, and which of these begin a sequence; packed ones begin where positions do."""
    shape, device = h_BTD.shape[:2], h_BTD.device
    mask_BT = batch.get("attention_mask")
    kept_BT = torch.ones(shape, dtype=torch.bool, device=device)
    if mask_BT is not None and mask_BT.shape == shape:
        kept_BT = mask_BT.bool().to(device)
    positions_BT = batch.get("position_ids")
    if positions_BT is not None:
        return kept_BT, (positions_BT.to(device) == 0) & kept_BT
    return kept_BT, kept_BT & (kept_BT.cumsum(1) == 1)
