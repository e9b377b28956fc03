"""What shards is what accelerate says, and a machine without an accelerator shards nothing."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from torch import nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

from lopt_hf.local.heads import LocalHeads
from lopt_hf.trainers.checks import check_fsdp
from lopt_hf.trainers.engines import asked_engine, engine_of, shard_heads_apart
from tests.tiny import make_model
from tests.trainers.helpers import make_trainer

needs_no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerate would shard here")


@needs_no_accelerator
def test_a_fallback_is_warned_of_once_and_trains_as_without_the_engine(tmp_path, monkeypatch, caplog):
    plain = make_trainer(tmp_path / "plain")
    assert "asked for" not in caplog.text
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer = make_trainer(tmp_path / "asked")
    assert caplog.text.count("FSDP1 was asked for, but accelerate runs one process on cpu: nothing is sharded") == 1
    assert trainer.boundary.mode == plain.boundary.mode == "eager"
    assert trainer.learner.run == plain.learner.run
    assert not any("local_heads" in name for name, _ in trainer.model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "environment", "engine"),
    [
        ({}, {}, None),
        ({"fsdp": True}, {}, "FSDP2"),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, {}, "FSDP1"),
        ({"fsdp": True, "fsdp_config": '{"version": 1}'}, {}, "FSDP1"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP1"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2"),
        ({"deepspeed": "zero2.json"}, {}, "DeepSpeed"),
        ({}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
    ],
    ids=str,
)
def test_the_engine_that_a_run_asks_for(monkeypatch, arguments, environment, engine):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert (
        asked_engine(SimpleNamespace(**{"fsdp": None, "fsdp_config": None, "deepspeed": None, **arguments})) == engine
    )


def plugin(**values):
    """Stands for accelerate's plugin, with what is asked of it here."""
    values = {"fsdp_version": 2, "activation_checkpointing": False, "cpu_ram_efficient_loading": False, **values}
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**values)))


@pytest.mark.parametrize(
    ("policy", "engine"),
    [
        (partial(transformer_auto_wrap_policy, transformer_layer_cls=set()), "FSDP2"),
        (partial(size_based_auto_wrap_policy, min_num_params=1), "FSDP2 with SIZE_BASED_WRAP"),
        (None, "FSDP2 with NO_WRAP"),
        (lambda module, recurse, nonwrapped_numel: True, "FSDP2 with an auto_wrap_policy of your own"),
    ],
)
def test_what_the_wrap_policy_makes_of_fsdp2(policy, engine):
    accelerator = plugin(auto_wrap_policy=policy)
    accelerator.distributed_type = DistributedType.FSDP
    assert engine_of(accelerator) == engine


def test_a_head_of_a_common_class_is_no_unit():
    accelerator = plugin(transformer_cls_names_to_wrap=None)
    message = "its head is a Linear.*a class of its own, or set local_backward to 'joint' and task_reach to 1"
    with pytest.raises(ValueError, match=message):
        shard_heads_apart(accelerator, make_model(), LocalHeads({0: nn.Linear(2, 2)}))


def test_heads_are_units_beside_the_layers():
    accelerator = plugin(transformer_cls_names_to_wrap=None)
    heads = LocalHeads({0: nn.Bilinear(2, 2, 2), 1: nn.Identity()})
    for _ in range(2):  # a second `train` finds what the first has left
        shard_heads_apart(accelerator, make_model(), heads)
    names = accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap
    assert names == ["LlamaDecoderLayer", "Bilinear"]


def test_the_readout_needs_the_weights_in_every_process():
    args = SimpleNamespace(local_objective="readout", clip_scope="block")
    trainer = SimpleNamespace(is_fsdp_enabled=True, accelerator=plugin(cpu_ram_efficient_loading=True), args=args)
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading=True .*local_objective='readout'.*to false"):
        check_fsdp(trainer)
