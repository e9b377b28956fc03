"""LISA and BAdam: a few decoder layers are trained at a time, and after some steps others.

What is trained at a step follows from the seed and the number of the step alone, so that a run that goes on from a
checkpoint has the same layers in turn. Both are written from their papers; `badam`, the library of BAdam's authors
(MIT), is not used, since it keeps its place in the order in no checkpoint, draws the order from torch's global random
state, and copies fp32 weights.
"""

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.utils import logging

from lopt_hf.common.settings import check_at_least
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.peers.base import Peer

__all__ = ["BADAM_PERIOD", "LISA", "LISA_LAYERS", "LISA_PERIOD", "BAdam"]

logger = logging.get_logger(__name__)

LISA_LAYERS = 2  # paper (arXiv 2403.17919), Tab. 1: embeddings, head and two layers, "E+H+2L"
LISA_PERIOD = 20  # its release, OptimalScale/LMFlow, scripts/run_finetune_with_lisa.sh
BADAM_PERIOD = 100  # K; the README of its release, Ledzy/BAdam: "the K Adam steps in paper"


class _LayerSwitching(Peer):
    """Trains some of the decoder layers, others after each period, which begin with a fresh optimizer state.

    Args:
        period: Optimizer steps from one choice of layers to the next.
        seed: What the choices follow from. Default: the run's.
    """

    trains_the_rest: ClassVar[bool]  # what is no decoder layer: embeddings, last norm, LM head

    def __init__(self, period: int, seed: int | None = None) -> None:
        check_at_least(f"{self.name}: period", period, 1)
        self.period = period
        self.seed = seed
        self._layers: list[list[nn.Parameter]] = []
        self._rest: list[nn.Parameter] = []

    @abstractmethod
    def active(self, step: int) -> Sequence[int]:
        """Returns the indices of the layers that are trained at an optimizer step."""

    @property
    @abstractmethod
    def full_round(self) -> int:
        """Optimizer steps in which every layer should have had its turn."""

    @property
    def num_layers(self) -> int:
        """Decoder layers of the model; 0 before `prepare`."""
        return len(self._layers)

    def settings(self) -> dict[str, Any]:
        return {"period": self.period, "seed": self.seed}

    def check(self, args: TrainingArguments) -> None:
        super().check(args)
        if self.seed is None:
            self.seed = args.seed

    def prepare(self, model: PreTrainedModel) -> None:
        """Notes what may be trained: what the user has frozen stays so."""
        layers = find_decoder_stack(model).layers
        self._layers = [[p for p in layer.parameters() if p.requires_grad] for layer in layers]
        in_layers = {id(parameter) for layer in layers for parameter in layer.parameters()}
        self._rest = [p for p in model.parameters() if p.requires_grad and id(p) not in in_layers]

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.max_steps < self.full_round:
            logger.warning(
                f"{self.name}: {state.max_steps} steps are not enough for every layer to be trained once, which takes "
                f"about {self.full_round}; lower the period ({self.period}) or train longer."
            )

    def begin_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Switches the layers of this step on and all others off, and drops the state of those that change."""
        active, is_switch = self.active(step), step % self.period == 0
        for index, parameters in enumerate(self._layers):
            for parameter in parameters:
                parameter.requires_grad_(index in active)
                if index not in active:
                    parameter.grad = None
                if is_switch or index not in active:
                    optimizer.state.pop(parameter, None)
        for parameter in self._rest:
            parameter.requires_grad_(self.trains_the_rest)

    def stop(self) -> None:
        for parameters in (*self._layers, self._rest):
            for parameter in parameters:
                parameter.requires_grad_(True)


class LISA(_LayerSwitching):
    """Layerwise importance sampled AdamW (https://huggingface.co/papers/2403.17919, Algorithm 1).

    Embeddings, last norm and LM head are trained at every step, and besides them some layers drawn at random, others
    after each period. The optimizer state of a layer is dropped at the end of its period, which is where the paper's
    memory goes; that of embeddings and head is kept.

    Args:
        layers: Layers that are trained at a time, the paper's gamma.
        period: Optimizer steps from one draw to the next, the paper's K.
        seed: What the draws follow from. Default: the run's.
    """

    name = "LISA"
    trains_the_rest = True

    def __init__(self, layers: int = LISA_LAYERS, period: int = LISA_PERIOD, seed: int | None = None) -> None:
        super().__init__(period, seed)
        check_at_least("LISA: layers", layers, 1)
        self.layers = layers

    def settings(self) -> dict[str, Any]:
        return {"layers": self.layers, **super().settings()}

    def prepare(self, model: PreTrainedModel) -> None:
        super().prepare(model)
        if self.layers > self.num_layers:
            raise ValueError(f"LISA: layers={self.layers}, but the model has {self.num_layers}; use at most as many.")

    @property
    def full_round(self) -> int:
        return self.period * -(-self.num_layers // self.layers)

    def active(self, step: int) -> list[int]:
        draw = random.Random(f"{self.seed} {step // self.period}")
        return sorted(draw.sample(range(self.num_layers), self.layers))


class BAdam(_LayerSwitching):
    """Block coordinate descent with Adam as the inner solver (https://huggingface.co/papers/2404.02827, Algorithm 1).

    One decoder layer at a time is trained, each with a fresh Adam state, in an order that is drawn anew in every round
    over the layers; the backward ends at the layer. Embeddings, last norm and LM head are not trained, which is the
    default of the authors' library.

    Args:
        period: Optimizer steps of a layer's turn, the paper's K. The README of the library suggests the number of
            steps of an epoch divided by the number of layers, but at least 50.
        seed: What the orders follow from. Default: the run's.
        order: Indices of the layers to train in turn, over and over, in place of all layers in a drawn order.
    """

    name = "BAdam"
    trains_the_rest = False

    def __init__(
        self, period: int = BADAM_PERIOD, seed: int | None = None, order: Sequence[int] | None = None
    ) -> None:
        super().__init__(period, seed)
        self.order = None if order is None else list(order)

    def settings(self) -> dict[str, Any]:
        return {"order": self.order, **super().settings()}

    def check(self, args: TrainingArguments) -> None:
        super().check(args)
        checkpointing: Any = args.gradient_checkpointing_kwargs or {}
        if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
            raise ValueError(
                "gradient_checkpointing_kwargs={'use_reentrant': True} does not work with BAdam: its backward ends "
                "within the layers, whose inputs have no gradient; set use_reentrant to False."
            )

    @property
    def full_round(self) -> int:
        return self.period * (self.num_layers if self.order is None else len(self.order))

    def active(self, step: int) -> list[int]:
        turn = step // self.period
        if self.order is not None:
            return [self.order[turn % len(self.order)]]
        past_rounds, place = divmod(turn, self.num_layers)
        layers = list(range(self.num_layers))
        random.Random(f"{self.seed} {past_rounds}").shuffle(layers)
        return [layers[place]]
