"""Arguments of the pipeline: what follows from what, and one clear error for what cannot work."""

import pytest

from lopt_hf import MLAANPipelineConfig, PipelineConfig


def make(tmp_path, **settings):
    return PipelineConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (2, 2)),
        ({"num_stages": 4}, (4, 4)),
        ({"num_blocks": 3}, (3, 3)),
        ({"num_blocks": 4, "num_stages": 2}, (4, 2)),
    ],
)
def test_blocks_and_stages(tmp_path, given, expected):
    args = make(tmp_path, **given)
    assert (args.num_blocks, args.num_stages) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_stages": 3, "num_blocks": 2}, "num_stages=3 is more than num_blocks=2"),
        ({"num_stages": 1}, "num_stages=1 must be an integer of at least 2"),
        ({"data_parallel": 0}, "data_parallel=0 must be"),
        ({"channel_depth": 0}, "channel_depth=0 must be"),
        ({"timeline_steps": -1}, "timeline_steps=-1 must be"),
        ({"peer_timeout": 1.0}, "peer_timeout=1.0 is too short"),
        ({"split": "fair"}, "split='fair' is unknown"),
        ({"clip_scope": "global"}, "clip_scope='global' does not work in a pipeline: each stage clips"),
        ({"gradient": "local", "local_backward": "joint"}, "local_backward='joint' needs"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch' is not supported"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 does not work in a pipeline"),
        ({"eval_on_start": True}, "eval_on_start=True does not work in a pipeline"),
        ({"trust_remote_code": True}, "trust_remote_code=True does not work in a pipeline: stages are made of"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 does not work in a pipeline: TRL"),
        ({"use_liger_kernel": True}, "use_liger_kernel=True does not work in a pipeline"),
        ({"torch_compile": True}, "torch_compile=True does not work in a pipeline"),
        ({"save_only_model": True}, "save_only_model=True does not work in a pipeline: a stage's checkpoint is what"),
        ({"save_strategy": "best"}, "save_strategy='best' does not work in a pipeline, whose stages do not evaluate"),
        (
            {"push_to_hub": True, "hub_strategy": "checkpoint"},
            "hub_strategy='checkpoint' does not work in a pipeline, which uploads the model at its end",
        ),
        ({"fsdp": "full_shard"}, "fsdp='full_shard' does not work in a pipeline, where each process has a stage"),
        ({"padding_free": True}, "padding_free=True does not keep to max_length=1024 without packing"),
        ({"late_warmup_steps": float("inf")}, "late_warmup_steps=inf must be a number of steps"),
        (
            {"average_tokens_across_devices": False, "data_parallel": 2},
            "average_tokens_across_devices=False with data_parallel=2 does nothing",
        ),
        (
            {"include_num_input_tokens_seen": True, "data_parallel": 2},
            "include_num_input_tokens_seen='all' with data_parallel=2 would count one replica's tokens",
        ),
        ({"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches=True does nothing"),
        ({"accelerator_config": {"dispatch_batches": False}}, "accelerator_config: dispatch_batches=False does noth"),
        ({"accelerator_config": {"even_batches": False}}, "accelerator_config: even_batches=False does nothing"),
        ({"gradient": "late"}, "gradient='late' is unknown, nearest is 'delayed'"),
        (
            {"gradient": "local", "gradient_recompute": False},
            "gradient_recompute=False does nothing with gradient='local'",
        ),
        ({"gradient": "local", "late_warmup_steps": 0.1}, "late_warmup_steps=0.1 does nothing with gradient='local'"),
        ({"late_warmup_steps": -1, "gradient": "delayed"}, "late_warmup_steps=-1 must be"),
        (
            {"gradient": "local", "weight_prediction": True},
            "weight_prediction=True does not work with gradient='local'",
        ),
        ({"gradient": "local", "task_reach": 2}, r"task_reach=\[2\] does not work with gradient='local'"),
        ({"gradient": "local", "local_objective": "none"}, "local_objective='none' leaves the early stages nothing"),
        ({"gradient": "local", "reach_unit": "run"}, "reach_unit='run' does nothing with task_reach"),
    ],
)
def test_bad_input(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 4, "num_stages": 2}, "num_blocks=4 with num_stages=2 does not work with gradient='delayed'"),
        ({"local_step": True}, "local_step=True does not work with gradient='delayed'"),
        ({"train_early_blocks": False}, "train_early_blocks=False does not work with gradient='delayed'"),
        ({"fp16": True}, "fp16=True does not work with gradient='delayed'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type='reduce_lr_on_plateau' does not work"),
        (
            {"optim": "sgd", "weight_prediction": True},
            "weight_prediction=True needs Adam's moments, which optim='sgd'",
        ),
        ({"optim": "lomo"}, "optim='lomo', which steps in the backward, does not work"),
        ({"local_objective": "readout"}, "local_objective='readout' does nothing with gradient='delayed'"),
        (
            {"local_objective": "reconstruction"},
            "local_objective='reconstruction' does nothing with gradient='delayed'",
        ),
        ({"reconstruction_weight": 1.0}, "reconstruction_weight=1.0 does nothing with gradient='delayed'"),
        ({"gradient_recompute": False, "activation_checkpointing": True}, "gradient_recompute=False does not work"),
        ({"gradient_recompute": False, "gradient": "local_and_delayed"}, "whose local backward frees the graph"),
        ({"task_reach": 1}, r"task_reach=\[1\] with gradient='delayed' sends no gradient"),
        ({"task_reach": [1, 3]}, "3 is not a number of blocks from 1 to num_blocks=2"),
        ({"task_reach": []}, r"task_reach=\[\] is an empty cycle"),
        ({"task_reach": "far"}, "task_reach='far' is not a number of blocks"),
        ({"task_reach": [1, 2], "num_blocks": 3}, "never reaches block 0 of num_blocks=3, and gradient='delayed'"),
        ({"task_reach": [1, 2], "reach_unit": "microbatch"}, "reach_unit='microbatch' does not work in a pipeline"),
        ({"task_reach": [1, 2], "reach_recompute": False}, "reach_recompute=False does nothing in a pipeline"),
        ({"gradient": "local_and_delayed", "task_reach": 1}, "gradient='local_and_delayed' sends no gradient"),
    ],
)
def test_bad_input_of_delayed_gradients(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, **{"gradient": "delayed", "activation_checkpointing": False, **settings})


def test_what_means_nothing_to_one_replica_is_left_alone(tmp_path):
    make(tmp_path, average_tokens_across_devices=False, include_num_input_tokens_seen=True)
    make(tmp_path, padding_free=True, packing=True)


def test_delayed_gradients_take_the_place_of_an_objective(tmp_path):
    args = make(tmp_path)
    assert args.gradient == "delayed"
    assert (args.local_objective, args.train_early_blocks, args.sends_gradients_back) == ("none", True, True)
    assert (args.task_reach, make(tmp_path, gradient="delayed", num_stages=3).task_reach) == ([2], [3])
    both = make(tmp_path, gradient="local_and_delayed", local_objective="readout")
    assert (both.local_objective, both.sends_gradients_back) == ("readout", True)
    local = make(tmp_path, gradient="local")
    assert (local.sends_gradients_back, local.task_reach, local.local_objective) == (False, [1], "reconstruction")


@pytest.mark.parametrize("asked", [{"local_objective": "reconstruction"}, {"num_blocks": 4, "num_stages": 2}])
def test_what_needs_local_objectives_has_them_by_default(tmp_path, asked):
    args = make(tmp_path, **asked)
    assert (args.gradient, args.local_objective) == ("local", "reconstruction")
    assert MLAANPipelineConfig(output_dir=str(tmp_path)).gradient == "local"
    assert make(tmp_path, local_objective="none").gradient == "delayed"


def test_weights_are_predicted_from_three_stages_on_where_the_optimizer_lets_them(tmp_path):
    assert not make(tmp_path).weight_prediction and make(tmp_path).late_warmup(10) == (0, None)
    three = make(tmp_path, num_stages=3)
    assert three.weight_prediction and (three.late_warmup(10), three.late_warmup(99)) == ((5, 10), (12, 99))
    assert not make(tmp_path, num_stages=3, optim="sgd").weight_prediction
    assert not make(tmp_path, num_stages=3, gradient="local").weight_prediction
    assert make(tmp_path, num_stages=3, late_warmup_steps=0.3).late_warmup(10) == (3, None)


def test_the_task_may_reach_stages_on_a_schedule(tmp_path):
    """Text as the command gets it, and a list as a YAML has it; not all stages where they have an objective too."""
    assert make(tmp_path, gradient="delayed", task_reach="[1,1,2]").schedule.cycle == (1, 1, 2)
    both = make(tmp_path, gradient="local_and_delayed", num_stages=3, task_reach=[1, 2], reach_unit="run")
    assert (both.schedule.cycle, both.schedule.unit) == ((1, 2), "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient": "delayed"}, "gradient='delayed' does not work with method='mlaan'"),
        ({"num_blocks": 2, "window": 2}, "window=2 is num_blocks, which is end-to-end training"),
        ({"readout": "ema"}, "readout='ema' follows a norm and LM head"),
        ({"split": "auto", "leap_layers": [3]}, "split='auto' with leap_layers"),
        ({"ema_decay": 0.9}, "ema_decay=0.9 does nothing with one block per stage"),
        ({"combine": "sum", "num_stages": 3}, "combine='sum' does nothing with one block per stage"),
        ({"num_stages": 1}, "num_stages=1 must be an integer of at least 2"),
    ],
)
def test_bad_input_of_mlaan(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MLAANPipelineConfig(output_dir=str(tmp_path), **settings)


def test_defaults_of_mlaan(tmp_path):
    args = MLAANPipelineConfig(output_dir=str(tmp_path))
    assert (args.num_blocks, args.num_stages, args.window) == (2, 2, 1)
    assert MLAANPipelineConfig(output_dir=str(tmp_path), num_blocks=4, num_stages=2, ema_decay=0.9).ema_decay == 0.9


def test_early_stages_may_be_frozen(tmp_path):
    args = PipelineConfig(str(tmp_path), gradient="local", train_early_blocks=False)
    assert args.freezes_early_blocks
    with pytest.raises(ValueError, match="local_objective='readout' does nothing where early blocks are frozen"):
        PipelineConfig(str(tmp_path), local_objective="readout", train_early_blocks=False)
