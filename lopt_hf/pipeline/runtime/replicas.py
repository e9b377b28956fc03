"""Replicas of a stage: each has its share of the data, and they average the stage's gradients."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from lopt_hf.common.distributed import GradientReducer, broadcast_parameters
from lopt_hf.pipeline.runtime.launch import PipelineWorld
from lopt_hf.pipeline.runtime.stage import StagePlan
from lopt_hf.trainers.mixin import LocalLearningMixin

__all__ = ["ReplicatedMixin"]


class ReplicatedMixin(LocalLearningMixin):
    """Local learning in a trainer of one of several replicas of a stage; put it before the trainer.

    Attributes:
        world: The processes of the run.
        plan: The stage.
    """

    world: PipelineWorld
    plan: StagePlan

    def _share_gradients(self) -> None:
        if self.world.num_replicas == 1:
            return
        trainable = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        source = self.world.rank_of(self.world.stage, 0)
        broadcast_parameters([*trainable, *self.local_heads.parameters()], source, self.world.data_group)
        reducer = GradientReducer(group=self.world.data_group)
        self.learner.reduce_by(reducer, [block.index for block in self.plan.blocks])

    def _num_counted_processes(self) -> int:
        return self.world.num_replicas

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        loader: Any = super()._get_dataloader(*args, **kwargs)
        if self.world.num_replicas == 1:
            return loader
        return prepare_data_loader(
            loader, self.args.device, self.world.num_replicas, self.world.replica, put_on_device=True
        )

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        num_items = super()._get_num_items_in_batch(batch_samples, device)
        if self.world.num_replicas > 1 and isinstance(num_items, torch.Tensor):
            num_items = num_items.to(device)
            dist.all_reduce(num_items, group=self.world.data_group)
        return num_items
