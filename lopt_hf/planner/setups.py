"""What each strategy does to a model, and its forward: as the trainers do it, by the same parts of the package.

Shapes: B batch, T tokens, D hidden channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from lopt_hf.local.blocks import find_decoder_stack, parameters_by_block, split_layers, untie_output_embeddings
from lopt_hf.local.boundary import GradientBoundary, make_heads
from lopt_hf.local.methods.mlaan.auxiliary import LeapAuxiliary
from lopt_hf.local.methods.mlaan.leaps import even_leaps, leap_counts
from lopt_hf.local.objectives import ReconstructionObjective
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.local.windows import LossWeights, WindowBoundary
from lopt_hf.mlaan.config import MLAANArguments
from lopt_hf.mlaan.setup import MAX_LOGITS, averaged_leaps, make_auxiliary
from lopt_hf.pipeline.runtime.stage import HiddenStateInput, StagePlan, keep_stage
from lopt_hf.planner.strategies import REPL_EVERY, Strategy
from lopt_hf.planner.task_loss import add_task_loss
from lopt_hf.repl.config import RepLConfig
from lopt_hf.repl.model import get_repl_model

__all__ = ["EndToEnd", "Local", "Windows", "make_setup"]

RECONSTRUCTION_WEIGHT = 10.0  # LoPT paper, Sec. 3. Like the seed, it changes no memory
SEED = 0
LORA_ALPHA_PER_RANK = 2  # TRL's defaults are 32 and 16

BlockDone = Callable[[int], None]  # told a block's index when all of its gradients are there


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
        steps_early: Whether an early block takes its optimizer step when its gradients are there.
        reentrant: The form of activation checkpointing.
    """

    steps_early = False
    reentrant = True  # of the two forms the one that `SavedBytes` can see into; the other keeps the same tensors

    def __init__(self, model: PreTrainedModel, strategy: Strategy, lora_r: int = 0) -> None:
        self.base = model
        self.model: Any = model
        self.heads = nn.ModuleDict()
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
        add_task_loss(self.base)

    def begin(self) -> None:
        """Does what needs the weights to be there, if only as fake tensors."""

    @property
    def clip_groups(self) -> list[list[nn.Parameter]]:
        """The parameters whose gradients are clipped together, group by group."""
        return [list(self.model.parameters())]

    @property
    def early_groups(self) -> int:
        """How many of these groups, from the first on, DDP does not see: `GradientReducer` averages them."""
        return 0

    @property
    def trainable(self) -> list[nn.Parameter]:
        """Everything that the optimizer gets."""
        return [parameter for group in self.clip_groups for parameter in group if parameter.requires_grad]

    def forward(self, inputs: Mapping[str, Any], done: BlockDone) -> torch.Tensor | None:
        """Runs a micro-batch's forward and the local backwards in it; returns the loss that is left, if any."""
        outputs = self.model(**inputs, use_cache=False, fused_lm_head=True)
        return -outputs.log_probs.sum() / outputs.label_mask.sum()

    @property
    def shows_saved_bytes(self) -> bool:
        """Whether `SavedBytes` sees all that autograd keeps."""
        return self.reentrant or not self.base.is_activation_checkpointing

    def finish(self) -> None:
        """Ends a micro-batch, after the backward of the loss that `forward` returned."""

    def after_step(self) -> None:
        """Does what follows an optimizer step."""


class Local(EndToEnd):
    """Training by local losses, as `LoPTTrainer` does it: all of a model, or the part of one that a stage holds.

    Args:
        model: The model.
        strategy: Its blocks, and whether the early ones learn.
        tied_embeddings: See `LocalLearningArguments`.
        stage: The stage to hold, of a pipeline.
    """

    def __init__(
        self, model: PreTrainedModel, strategy: Strategy, tied_embeddings: str, stage: StagePlan | None
    ) -> None:
        self.stage = stage
        self._separate_embeddings(model, tied_embeddings)
        if stage is not None:
            keep_stage(model, stage)
        super().__init__(model, strategy)
        self.stack = find_decoder_stack(model)
        self.blocks = split_layers(len(self.stack.layers), strategy.num_blocks)
        self.early = [block for block in self.blocks[:-1] if stage is None or block in stage.blocks]
        self.learns = strategy.method != "freeze"
        if not self.learns:
            for block in self._owned()[:-1]:
                for parameter in block.values():
                    parameter.requires_grad_(False)
        self.mode: Literal["eager", "joint"] = "joint" if strategy.method == "joint" else "eager"
        self.steps_early = strategy.method == "lopt_local_step"
        self.heads = self._make_heads()
        self.input = None
        if stage is not None and not stage.is_first:
            self.input = HiddenStateInput(self.stack.layers[stage.start])

    def _make_heads(self) -> nn.ModuleDict:
        learning = self.early if self.learns else []
        return make_heads(ReconstructionObjective(), self.stack.hidden_size, self.blocks, SEED, only=learning)

    def begin(self) -> None:
        self.boundary = self._make_boundary()

    def _make_boundary(self) -> GradientBoundary:
        return GradientBoundary(
            self.base,
            self.blocks,
            ReconstructionObjective(),
            self.heads,
            RECONSTRUCTION_WEIGHT / (len(self.blocks) - 1),
            self.mode,
            early_blocks=self.early,
        )

    @staticmethod
    def _separate_embeddings(model: PreTrainedModel, tied_embeddings: str) -> None:
        if tied_embeddings == "untie":
            untie_output_embeddings(model)
            return
        embeddings: Any = model.get_input_embeddings()
        head: Any = model.get_output_embeddings()
        if head.weight is embeddings.weight:
            head.weight.requires_grad_(False)

    def _add_loss(self) -> None:
        if self.stage is None or self.stage.is_last:
            super()._add_loss()

    def _owned(self) -> list[dict[str, nn.Parameter]]:
        return parameters_by_block(self.model, self.stack, self.blocks)

    @property
    def clip_groups(self) -> list[list[nn.Parameter]]:
        groups = [list(block.values()) for block in self._owned()]
        for index, head in self.heads.items():
            groups[int(index)].extend(head.parameters())
        return groups

    @property
    def early_groups(self) -> int:
        # The released code has one backward, and DDP averages everything.
        return len(self.blocks) - 1 if self.mode == "eager" else 0

    def forward(self, inputs: Mapping[str, Any], done: BlockDone) -> torch.Tensor | None:
        def run_backward(index: int, loss: torch.Tensor) -> None:
            loss.backward()
            done(index)

        if self.input is not None:
            shape = (*inputs["input_ids"].shape, self.stack.hidden_size)
            dtype = next(self.model.parameters()).dtype
            hidden_BTD = torch.empty(shape, dtype=dtype)
            self.input.hidden_BTD = hidden_BTD.requires_grad_(self.base.is_activation_checkpointing)
        with self.boundary.training_forward(run_backward, 1.0, self.learns, inputs):
            if self.stage is not None and not self.stage.is_last:
                self.base.base_model(**{k: v for k, v in inputs.items() if k != "labels"}, use_cache=False)
                return None
            loss = super().forward(inputs, done)
        joint_loss = self.boundary.joint_loss()
        return loss if joint_loss is None or loss is None else loss + joint_loss


class Windows(Local):
    """Training in windows of blocks, as `MLAANTrainer` does it with the defaults of `MLAANArguments`.

    What comes before training (choosing leaps, fitting translators) needs less than a step, and is not simulated.

    Args:
        model: The model.
        strategy: Its blocks, and how many of them a loss reaches.
        tied_embeddings: See `MLAANArguments`.
    """

    boundary: WindowBoundary

    def __init__(self, model: PreTrainedModel, strategy: Strategy, tied_embeddings: str) -> None:
        self.window = strategy.window
        self.reentrant = self.window == 1  # a wider one hands cotangents back, which the reentrant form cannot
        super().__init__(model, strategy, tied_embeddings, stage=None)

    def _make_heads(self) -> nn.ModuleDict:
        counts = leap_counts(self.blocks, MLAANArguments.leap_share)
        leaps = [
            even_leaps(block.stop, len(self.stack.layers), count)
            for block, count in zip(self.early, counts, strict=True)
        ]
        return nn.ModuleDict(
            {
                str(block.index): make_auxiliary(
                    self.base, self.stack, block.stop, indices, averaged_leaps(indices, MLAANArguments), MLAANArguments
                )
                for block, indices in zip(self.early, leaps, strict=True)
            }
        )

    def _make_boundary(self) -> WindowBoundary:
        objective = ReadoutObjective.from_model(self.base, max_logits=MAX_LOGITS)
        self.frozen.append(objective.readout)
        weights = LossWeights(MLAANArguments.independent_weight, MLAANArguments.cascaded_weight)
        return WindowBoundary(
            self.base, self.blocks, objective, self.heads, self.window, weights, task_share=weights.cascaded
        )

    def forward(self, inputs: Mapping[str, Any], done: BlockDone) -> torch.Tensor | None:
        self.boundary.when_done = done  # a block's gradients are complete when its last window is
        return super().forward(inputs, lambda index: None)

    def finish(self) -> None:
        self.boundary.finish(lambda index, loss: loss.backward())
        self.boundary.when_done = None

    def after_step(self) -> None:
        for auxiliary in self.heads.values():
            cast(LeapAuxiliary, auxiliary).update_averages(self.stack.layers, MLAANArguments.ema_decay)


def make_setup(
    model: PreTrainedModel, strategy: Strategy, lora_r: int, tied_embeddings: str, stage: StagePlan | None = None
) -> EndToEnd:
    """Prepares a model for a strategy; it is changed in place."""
    if strategy.num_blocks == 1:
        return EndToEnd(model, strategy, lora_r)
    if strategy.method == "mlaan":
        return Windows(model, strategy, tied_embeddings)
    return Local(model, strategy, tied_embeddings, stage)
