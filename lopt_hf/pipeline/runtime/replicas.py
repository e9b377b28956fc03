"""Replicas of a stage: each has its share of the data, and they average the stage's gradients."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import IterableDatasetShard, prepare_data_loader
from torch.utils.data import IterableDataset

from lopt_hf.common.distributed import GradientReducer, broadcast_parameters
from lopt_hf.pipeline.runtime.launch import PipelineWorld

__all__ = ["count_over_replicas", "own_share", "own_stream", "share_gradients"]


def share_gradients(trainer: Any) -> None:
    """Gives all replicas of a stage the same start, and averages their gradients from now on.

    Args:
        trainer: The stage's trainer.
    """
    world = trainer.world
    if world.num_replicas == 1:
        return
    trainable = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    source = world.rank_of(world.stage, 0)
    broadcast_parameters([*trainable, *trainer.local_heads.parameters()], source, world.data_group)
    reducer = GradientReducer(group=world.data_group)
    trainer.learner.reduce_by(reducer, [block.index for block in trainer.plan.blocks])


def own_stream(dataset: Any, world: PipelineWorld, batch_size: int) -> Any:
    """Returns the batches of a stream that are this replica's, in turns; any other data set as it is.

    Not its files, which accelerate would share out: they may differ in length, and the replicas wait for each other.

    Args:
        dataset: The data.
        world: The processes of the run.
        batch_size: Rows of a micro-batch.
    """
    if world.num_replicas == 1 or not isinstance(dataset, IterableDataset):
        return dataset
    return IterableDatasetShard(dataset, batch_size, num_processes=world.num_replicas, process_index=world.replica)


def own_share(loader: Any, world: PipelineWorld, device: torch.device) -> Any:
    """Returns a data loader of the batches that are this replica's; one of `own_stream` as it is."""
    if world.num_replicas == 1 or isinstance(loader.dataset, IterableDataset):
        return loader
    return prepare_data_loader(loader, device, world.num_replicas, world.replica, put_on_device=True)


def count_over_replicas(
    num_items: torch.Tensor | int | None, world: PipelineWorld, device: torch.device
) -> torch.Tensor | int | None:
    """Adds up, over the replicas of a stage, what the loss of a step is divided by."""
    if world.num_replicas > 1 and isinstance(num_items, torch.Tensor):
        num_items = num_items.to(device)
        dist.all_reduce(num_items, group=world.data_group)
    return num_items
