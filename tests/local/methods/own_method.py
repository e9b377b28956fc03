"""A method of one's own, whole: early blocks learn to change what they are given as little as they can."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn
from trl import DPOConfig, SFTConfig

from lopt_hf import LocalArguments, LocalTrainingArguments, Method, PipelineArguments


class StayClose:
    """The objective: the mean square of what a block adds to its input, relative to the input's."""

    def make_head(self, hidden_size: int) -> nn.Module:
        return nn.Linear(hidden_size, hidden_size)  # it may turn the output before the two are compared

    def __call__(self, head: Any, output_BTD: torch.Tensor, input_BTD: torch.Tensor, batch: Any) -> torch.Tensor:
        added_BTD = head(output_BTD.to(head.weight.dtype)).float() - input_BTD.float()
        return added_BTD.square().mean() / input_BTD.float().square().mean()


class StayCloseMethod(Method):
    def make_objective(self, learner: Any) -> StayClose:
        return StayClose()

    def make_boundary(self, learner: Any, *parts: Any) -> Any:
        boundary = super().make_boundary(learner, *parts)
        boundary.weight = learner.settings.closeness
        return boundary

    def fingerprint(self, learner: Any, objective: Any) -> dict[str, Any]:
        return {"method": "stay close", "closeness": learner.settings.closeness}


@dataclass
class StayCloseArguments(LocalArguments):
    _lowest: ClassVar[dict[str, float]] = LocalArguments._lowest | {"closeness": 0.0}
    closeness: float = field(default=0.1, metadata={"help": "Weight of the early blocks' loss."})

    def make_method(self) -> StayCloseMethod:
        return StayCloseMethod()


@dataclass
class StayCloseSFTConfig(LocalTrainingArguments, StayCloseArguments, SFTConfig): ...


@dataclass
class StayCloseDPOConfig(LocalTrainingArguments, StayCloseArguments, DPOConfig): ...


@dataclass
class StayClosePipelineConfig(PipelineArguments, StayCloseSFTConfig): ...
