"""The state that each optimizer keeps."""

import pytest
import torch
from torch import nn

from lopt_hf.planner.optimizers import OPTIMIZERS, make_optimizer

ENTRIES = 64 * 128  # of the matrix; the bias has 64


def state_bytes(name):
    model = nn.ModuleDict({"linear": nn.Linear(128, 64), "embedding": nn.Embedding(64, 128)})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(name, list(model.parameters()), model)
    optimizer.step()
    tensors = {
        parameter: [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        for parameter in model.parameters()
    }
    size = {
        parameter: sum(tensor.nbytes for tensor in own if tensor.numel() > 1) for parameter, own in tensors.items()
    }
    return [size[model["linear"].weight], size[model["linear"].bias], size[model["embedding"].weight]]


@pytest.mark.parametrize(
    ("name", "matrix", "bias", "embedding"),
    [
        ("adamw_torch_fused", 8 * ENTRIES, 512, 8 * ENTRIES),
        ("adamw_torch", 8 * ENTRIES, 512, 8 * ENTRIES),
        # bitsandbytes: two bytes and two fp32 scales per 256 entries; small tensors and embeddings in fp32
        ("adamw_8bit", 2 * ENTRIES + 2 * 4 * 32, 512, 8 * ENTRIES),
        ("adamw_bnb_8bit", 2 * ENTRIES + 2 * 4 * 32, 512, 8 * ENTRIES),
        ("sgd", 0, 0, 0),
        ("adagrad", 4 * ENTRIES, 256, 4 * ENTRIES),
        ("adafactor", 4 * (64 + 128), 256, 4 * (64 + 128)),
    ],
)
def test_state(name, matrix, bias, embedding):
    assert state_bytes(name) == [matrix, bias, embedding]


def test_every_optimizer_is_tested_and_one_of_transformers():
    from transformers.training_args import OptimizerNames

    assert OPTIMIZERS.keys() <= {name.value for name in OptimizerNames}
    assert len(OPTIMIZERS) == 7
