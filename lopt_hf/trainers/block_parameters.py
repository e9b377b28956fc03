"""Which parameters belong to which block, and which of them learn."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from lopt_hf.local.blocks import Block, DecoderStack, parameters_by_block, untie_output_embeddings
from lopt_hf.trainers.lopt_config import LocalLearningArguments

__all__ = ["BlockParametersMixin", "ClipGroup"]

# The mixins stand before a trainer in the list of base classes; a type checker is told that they are one.
if TYPE_CHECKING:
    from transformers import Trainer as TrainerBase
else:
    TrainerBase = object

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ClipGroup:
    """Parameters whose gradients are clipped together.

    Attributes:
        name: What they are, for messages; each group of a model has another.
        block: Index of the block that owns them.
        parameters: The parameters, frozen ones included.
    """

    name: str
    block: int
    parameters: list[nn.Parameter]


class BlockParametersMixin(TrainerBase):
    """Tells a trainer's parameters apart by block; the boundary between them is `LoPTMixin`'s."""

    args: Any
    model: Any
    stack: DecoderStack
    blocks: list[Block]
    early_blocks: list[Block]  # those that run in this process
    local_heads: nn.ModuleDict
    _heads_in_model: bool

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

    def _learners(self) -> list[list[nn.Parameter]]:
        """For each block the parameters that its gradients are for: its own and its head's."""
        groups = [[p for n, p in block.items() if ".local_heads." not in f".{n}"] for block in self._owned()]
        for index, head in self.local_heads.items():
            groups[int(index)].extend(head.parameters())
        return groups

    def _clip_groups(self) -> list[ClipGroup]:
        """What is clipped apart; of a block's groups the one first that a backward completes first."""
        learners = self._learners()
        if self.args.clip_scope != "part":
            return [ClipGroup(f"block {index}", index, parameters) for index, parameters in enumerate(learners)]
        in_layers = {id(p) for module in (*self.stack.layers, self.local_heads) for p in module.parameters()}
        groups: list[ClipGroup] = []
        for index, parameters in enumerate(learners):
            inside, outside = ([p for p in parameters if (id(p) in in_layers) is where] for where in (True, False))
            layers = ClipGroup(f"block {index}'s layers", index, inside)
            others = ClipGroup(f"block {index} but its layers", index, outside)
            groups += [others, layers] if index == len(learners) - 1 else [layers, others]
        return groups

    def _device_of(self, block: Block) -> torch.device:
        """Where a block ends: a model may be spread over devices, or not yet be on its own (FSDP)."""
        device = next(self.stack.layers[block.stop - 1].parameters()).device
        return self.args.device if device.type in ("cpu", "meta") else device

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
        self._check_early_rate()

    def _check_early_rate(self) -> None:
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
