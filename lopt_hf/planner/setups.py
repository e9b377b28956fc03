"""What each strategy does to a model, and its forward; local learning by the learner that trainers run.

Shapes: B batch, T tokens, D hidden channels.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from lopt_hf.common.distributed import GradientReducer
from lopt_hf.common.upstream.trl import add_sft_head
from lopt_hf.local.arguments import LocalArguments
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.learner import LearnerEvents, LocalLearner
from lopt_hf.local.methods.mlaan.method import MLAANArguments
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.local.stacks import find_decoder_stack
from lopt_hf.peers.arguments import PeerArguments
from lopt_hf.peers.base import Peer
from lopt_hf.peers.layer_switching import LISA, BAdam
from lopt_hf.peers.step_in_backward import StepInBackward
from lopt_hf.pipeline.runtime.stage import HiddenStateInput, keep_stage, separate_stage_embeddings
from lopt_hf.pipeline.runtime.stage_plan import StagePlan
from lopt_hf.planner.memory import MemoryMeter
from lopt_hf.planner.strategies import REPL_EVERY, Strategy
from lopt_hf.planner.task_loss import PlannedTokenLoss
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.mapping import get_repl_model

__all__ = ["EndToEnd", "Local", "WithPeer", "make_setup"]

DEFAULT_SEED = 42  # transformers, TrainingArguments
LORA_ALPHA_PER_RANK = 2  # TRL's defaults are 32 and 16


class EndToEnd:
    """Training by one loss: of a whole model, of adapters, or of a model with surrogates.

    Args:
        model: The model; it is changed in place.
        strategy: What to do to it.
        lora_r: Rank of the adapters, for the strategy that has them.

    Attributes:
        base: The model that has the decoder.
        model: What is called: the same, or its PEFT wrapper.
        heads: What is trained besides the model.
        frozen: What is neither of the model nor trained.
        reentrant: The form of activation checkpointing.
        cycle: Optimizer steps after which what a step costs repeats.
    """

    cycle = 1

    reentrant = True  # of the two forms the one that `SavedBytes` can see into; the other keeps the same tensors

    def __init__(self, model: PreTrainedModel, strategy: Strategy, lora_r: int = 0) -> None:
        self.base = model
        self.model: Any = model
        self.heads: nn.ModuleDict = LocalHeads()
        self.frozen = nn.ModuleList()
        if strategy.method == "repl":
            # What the surrogates start from changes no arithmetic.
            self.base = get_repl_model(model, RepLConfig(placement="every", every=REPL_EVERY, init="skip"))
        self._add_loss()
        if strategy.method == "lora":
            config = LoraConfig(
                r=lora_r, lora_alpha=LORA_ALPHA_PER_RANK * lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
            )
            self.model = get_peft_model(self.base, config)  # type: ignore[arg-type]
        else:
            self.model = self.base
        if strategy.checkpointing:
            self.base.activation_checkpointing_enable({"use_reentrant": self.reentrant, "preserve_rng_state": False})
            if strategy.method == "lora":
                self.base.enable_input_require_grads()
        self.base.train()

    def _add_loss(self) -> None:
        add_sft_head(self.base)

    def begin(self, meter: MemoryMeter, events: LearnerEvents, reducer: GradientReducer | None) -> None:
        """Does what needs the weights to be there, if only as fake tensors.

        Args:
            meter: What counts memory and work.
            events: What a learner asks of the step.
            reducer: What averages gradients that DDP does not see, with several devices.
        """

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        """Begins training by an optimizer of `trainable`."""

    def begin_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Begins an optimizer step, counted from 0."""

    @property
    def seen_by_ddp(self) -> list[nn.Parameter]:
        """The parameters whose gradients DDP averages itself."""
        return list(self.model.parameters())

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Everything that the optimizer gets."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def micro_batch(self, synchronises: bool) -> contextlib.AbstractContextManager[None]:
        """Makes the context of a micro-batch's forward and backward; the last one of a step synchronises."""
        return contextlib.nullcontext()

    def forward(self, inputs: Mapping[str, Any], step: int, synchronises: bool) -> torch.Tensor | None:
        """Runs a micro-batch's forward and the local backwards in it; returns the loss that is left, if any."""
        outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.sum() / outputs.label_mask.sum()

    @property
    def shows_saved_bytes(self) -> bool:
        """Whether `SavedBytes` sees all that autograd keeps."""
        return self.reentrant or not self.base.is_activation_checkpointing

    def finish(self) -> None:
        """Ends a micro-batch, after the backward of the loss that `forward` returned."""

    def clip(self, max_norm: float) -> None:
        """Clips the gradients of a step."""
        clip_grad_norm_(list(self.model.parameters()), max_norm)

    def after_step(self) -> None:
        """Does what follows an optimizer step."""


class WithPeer(EndToEnd):
    """Training by one loss with a peer's callback.

    Args:
        model: The model.
        strategy: What to do to it.
        peer: The callback.
    """

    def __init__(self, model: PreTrainedModel, strategy: Strategy, peer: Peer) -> None:
        self.peer = peer
        if isinstance(peer, BAdam):
            self.reentrant = False  # that form needs inputs with a gradient
            self.cycle = peer.full_round
        super().__init__(model, strategy)

    def begin(self, meter: MemoryMeter, events: LearnerEvents, reducer: GradientReducer | None) -> None:
        self.peer.prepare(self.base)

    def start(self, optimizer: torch.optim.Optimizer) -> None:
        self.peer.start(optimizer)

    def begin_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.peer.begin_step(optimizer, step)

    def clip(self, max_norm: float) -> None:
        if not isinstance(self.peer, StepInBackward):
            super().clip(max_norm)


class Local(EndToEnd):
    """Training by a method of local learning: all of a model, or the part of one that a stage holds.

    What comes before training (choosing leaps, fitting translators) needs less than a step, and is not simulated.

    Args:
        model: The model.
        strategy: Which method, and its arguments.
        settings: The method's arguments.
        stage: The stage to hold, of a pipeline.
    """

    learner: LocalLearner

    def __init__(
        self, model: PreTrainedModel, strategy: Strategy, settings: LocalArguments, stage: StagePlan | None
    ) -> None:
        self.stage = stage
        self.settings = settings
        if isinstance(settings, MLAANArguments):
            self.reentrant = settings.window == 1  # a wider one hands cotangents back, which that form cannot
        if stage is not None:
            separate_stage_embeddings(model, settings.tied_embeddings)
            keep_stage(model, stage)
        super().__init__(model, strategy)
        self.input = None
        if stage is not None and not stage.is_first:
            self.input = HiddenStateInput(find_decoder_stack(model).layers[stage.start])

    def _add_loss(self) -> None:
        if self.stage is None or self.stage.is_last:
            super()._add_loss()

    def begin(self, meter: MemoryMeter, events: LearnerEvents, reducer: GradientReducer | None) -> None:
        early = None
        if self.stage is not None:
            early = [block.index for block in self.stage.blocks if block.index < self.settings.num_blocks - 1]
        self.learner = LocalLearner(self.model, self.settings, early_blocks=early, events=events)
        self.cycle = self.learner.schedule.period
        self.heads = self.learner.heads
        objective: Any = self.learner.boundary.objective
        if isinstance(objective, ReadoutObjective):
            self.frozen.append(objective.readout)
            objective.token_loss = PlannedTokenLoss(meter)
        # Local losses that wait for the task's have one backward with it, and DDP averages everything.
        if reducer is not None and not self._is_joint:
            self.learner.reduce_by(reducer, range(len(self.learner.blocks) - 1))

    @property
    def _is_joint(self) -> bool:
        return self.learner.boundary.mode == "joint"

    @property
    def seen_by_ddp(self) -> list[nn.Parameter]:
        learners = self.learner.parameters_to_learn() if self._is_joint else self.learner.parameters_to_learn()[-1:]
        return [parameter for block in learners for parameter in block]

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for block in self.learner.parameters_to_learn() for p in block if p.requires_grad]

    def micro_batch(self, synchronises: bool) -> contextlib.AbstractContextManager[None]:
        return self.learner.micro_batch(synchronises)

    def forward(self, inputs: Mapping[str, Any], step: int, synchronises: bool) -> torch.Tensor | None:
        if self.input is not None:
            shape = (*inputs["input_ids"].shape, self.learner.stack.hidden_size)
            hidden_BTD = torch.empty(shape, dtype=next(self.model.parameters()).dtype)
            self.input.hidden_BTD = hidden_BTD.requires_grad_(self.base.is_activation_checkpointing)
        with self.learner.forward(inputs, step, synchronises=synchronises):
            if self.stage is not None and not self.stage.is_last:
                self.base.base_model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
                return None
            loss = super().forward(inputs, step, synchronises)
        assert loss is not None
        return self.learner.with_joint_loss(loss)

    def finish(self) -> None:
        self.learner.after_backward()

    def clip(self, max_norm: float) -> None:
        self.learner.wait_for_averages()
        self.learner.clip(max_norm)

    def after_step(self) -> None:
        self.learner.after_step()


def make_setup(
    model: PreTrainedModel, strategy: Strategy, lora_r: int, tied_embeddings: str, stage: StagePlan | None = None
) -> EndToEnd:
    """Prepares a model for a strategy; it is changed in place."""
    settings = strategy.local_arguments(tied_embeddings)
    if strategy.is_peer:
        return WithPeer(model, strategy, _make_peer(model, strategy))
    if settings is None:
        return EndToEnd(model, strategy, lora_r)
    return Local(model, strategy, settings, stage)


def _make_peer(model: PreTrainedModel, strategy: Strategy) -> Peer:
    """The callback of a peer.

    BAdam trains the first layer and the last in turn, each once more than it takes to have its state. Its cost is
    linear in a layer's place, so the mean of the two is that of all layers, and the first one's peak is the highest.
    LISA trains the layers that it begins with in a run with the default seed.
    """
    if strategy.method == "badam":
        num_layers = model.config.get_text_config(decoder=True).num_hidden_layers
        return BAdam(period=2, order=(0, num_layers - 1))
    if strategy.method == "lisa":
        return LISA(seed=DEFAULT_SEED)
    return PeerArguments(num_blocks=strategy.num_blocks).make_peer(strategy.method)
