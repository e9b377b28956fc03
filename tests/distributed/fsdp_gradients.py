"""The joint local backward under FSDP2, on one of two ranks."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from lopt_hf.local.blocks import find_decoder_stack, split_layers
from lopt_hf.local.boundary import GradientBoundary
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.micro_batch import MicroBatch
from lopt_hf.local.objectives import ReconstructionObjective
from tests.tiny import make_model


def joint_gradients(shard: bool, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradients of task and local loss in one backward, with the heads in the model as the trainer has them."""
    model = make_model()
    stack = find_decoder_stack(model)
    objective = ReconstructionObjective()
    blocks = split_layers(4, 2)
    heads = LocalHeads.make(objective, stack.hidden_size, blocks, seed=0)
    model.add_module("local_heads", heads)
    boundary = GradientBoundary(model, blocks, objective, heads, 10.0, "joint")
    if shard:
        for layer in stack.layers:
            fully_shard(layer)
        fully_shard(model)
    model.train()
    with boundary.training_forward(MicroBatch()):
        loss = model(input_ids=rows, labels=rows).loss
    (loss + boundary.joint_loss()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: g.full_tensor() if shard else g for name, g in gradients.items()}


def assert_sharded_gradients_are_those_of_the_whole_model() -> None:
    """On each of two ranks, with half of the rows."""
    rows = torch.randint(3, 80, (4, 20), generator=torch.Generator().manual_seed(0))
    rank = dist.get_rank()
    sharded = joint_gradients(True, rows[2 * rank : 2 * rank + 2])
    whole = joint_gradients(False, rows)
    for name, gradient in whole.items():
        torch.testing.assert_close(sharded[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
