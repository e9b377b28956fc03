"""Plans of vision-language models: text-only sequences, with the weights of what sees, which is frozen."""

import pytest

from lopt_hf.planner.plan import PlanSettings, make_plan
from tests.tiny_vision import make_vision_model

SETTINGS = {"model": "tiny", "device_memory": "1GiB", "batch_size": 2, "seq_length": 32, "num_blocks": (2,)}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_the_weights_of_what_sees_are_counted_and_frozen(family):
    model = make_vision_model(family)
    seeing = sum(p.numel() for n, p in model.named_parameters() if "language_model" not in n and "lm_head" not in n)
    plan = make_plan(PlanSettings(**SETTINGS, strategies=("e2e", "lopt")), model.config)
    end_to_end, lopt = plan.rows[0].cost, plan.rows[2].cost
    assert end_to_end.parameters == model.num_parameters() and seeing > 0
    assert end_to_end.parameters - end_to_end.trainable == lopt.parameters - lopt.trainable == seeing


def test_rows_that_cannot_be_are_left_out_with_the_reason():
    settings = PlanSettings(**SETTINGS, num_gpus=2, strategies=("lopt", "reach", "ppll", "repl"))
    plan = make_plan(settings, make_vision_model("qwen3_vl").config)
    assert {row.strategy.method for row in plan.rows} == {"lopt"}
    assert [line.partition(":")[0] for line in plan.left_out] == ["PPLL", "reach", "RepL"]
