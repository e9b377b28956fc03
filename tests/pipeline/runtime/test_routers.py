"""What balances the experts of a stage weighs as much as in one process."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lopt_hf.local.blocks import split_layers
from lopt_hf.local.routers import RouterLogits, count_routers
from lopt_hf.pipeline.runtime.stage import keep_stage
from lopt_hf.pipeline.runtime.stage_plan import plan_stages
from lopt_hf.pipeline.runtime.trainer import PipelineTrainer
from tests.tiny import make_model


def own_routers(model, plan):
    """What the trainer of a stage counts, for the weight of TRL's loss."""
    trainer = object.__new__(PipelineTrainer)
    trainer.learner, trainer.plan = SimpleNamespace(base_model=model), plan
    return trainer._count_own_routers()


@pytest.mark.parametrize(("step", "own"), [(1, [2, 2]), (2, [1, 1])], ids=["sparse", "every second layer"])
def test_each_router_weighs_as_in_the_whole_model(step, own):
    """Where some layers are dense, there are fewer routers than layers."""
    whole = make_model("qwen3_moe", decoder_sparse_step=step)
    with torch.no_grad():
        logits = whole(input_ids=torch.arange(3, 35).reshape(2, 16), output_router_logits=True).router_logits
    assert len(logits) == count_routers(whole) == sum(own)
    first = 0
    for plan, number in zip(plan_stages(split_layers(4, 2), 2), own, strict=True):
        stage = make_model("qwen3_moe", decoder_sparse_step=step)
        keep_stage(stage, plan)
        routers = RouterLogits(stage, plan.num_layers, coefficient=0.5)
        assert (own_routers(stage, plan), routers.num_routers) == (number, sum(own))
        of_stage = logits[first : first + number]
        expected = 0.5 * number / sum(own) * load_balancing_loss_func(of_stage, 4, 2, None)
        torch.testing.assert_close(routers.loss_of(of_stage, None), expected)
        first += number


def test_a_model_that_does_not_say_which_its_routers_are_has_one_in_each_layer():
    first, _ = plan_stages(split_layers(4, 2, [3]), 2)
    assert count_routers(make_model()) == 0
    assert (own_routers(make_model(), first), RouterLogits(make_model(), 4, 0.5).num_routers) == (3, 4)
