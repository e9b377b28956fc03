"""Under DeepSpeed two gloo processes end where one process does, and what cannot be right is refused."""

import importlib.util

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lopt_hf import LoPTConfig
from lopt_hf.scripts.sft import main as sft
from tests.distributed.deepspeed_worker import RUNS, make_run
from tests.distributed.engines import launch
from tests.trainers.helpers import snapshot, training_args

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install 'lopt_hf[deepspeed]'"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    result = launch("zero2_8", "tests.distributed.deepspeed_worker", str(folder))
    return folder, result


def weights(runs, name, end="weights"):
    folder, result = runs
    files = [folder / name / f"{end}-{rank}.safetensors" for rank in range(2)]
    assert all(file.exists() for file in files), f"{name} has not ended: {result.stderr[-3000:]}"
    first, second = map(load_file, files)
    assert all(torch.equal(first[key], second[key]) for key in first)
    return first


@needs_deepspeed
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_equal_one(runs, tmp_path, name):
    """The same micro-batches, half of them on each rank."""
    run = RUNS[name]
    accumulation = 2 * run.settings.get("gradient_accumulation_steps", 1)
    more = {"gradient_accumulation_steps": accumulation, "save_strategy": "no"}
    trainer = make_run(run, tmp_path, **more)
    trainer.train()
    one, two = snapshot(trainer), weights(runs, name)
    assert one.keys() <= two.keys()
    worst = {key: ((two[key] - weight).norm() / weight.norm()).item() for key, weight in one.items()}
    assert max(worst.values()) <= 3e-6, max(worst.items(), key=lambda item: item[1])


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_resumed_run_ends_where_the_whole_one_does(runs, stage):
    whole, resumed = weights(runs, f"ZeRO-{stage}"), weights(runs, f"ZeRO-{stage}", "resumed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@needs_deepspeed
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("saved", ["saved", "checkpoint-3"])
def test_what_is_saved_is_a_stock_checkpoint(runs, stage, saved):
    trained = weights(runs, f"ZeRO-{stage}")
    model, info = AutoModelForCausalLM.from_pretrained(
        runs[0] / f"ZeRO-{stage}" / saved, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    assert all(torch.equal(parameter, trained[name]) for name, parameter in model.named_parameters())


REFUSED = {
    "clip_scope": ({}, "clip_scope='block'.*set it to 'global'"),
    "local_update_interval": ({"local_update_interval": 2}, "local_update_interval=2.*set it to 1"),
    "task_reach": ({"task_reach": "[1,2]"}, r"task_reach=\[1, 2\].*set it to 1"),
    "reach of micro-batches": (
        {"task_reach": "[1,2]", "reach_unit": "microbatch", "local_objective": "none"},
        r"task_reach=\[1, 2\].*set it to 1",
    ),
    "local_step": ({"local_step": True, "clip_scope": "block"}, "DeepSpeed, which clips; set it to 'global'"),
    "local_step, global": ({"local_step": True}, "local_step=True.*set local_step to False"),
    "local_backward": ({"local_backward": "eager"}, "local_backward='eager'.*set local_backward to 'joint'"),
    "local_objective": ({"local_objective": "readout"}, "local_objective='readout'.*set it to 'reconstruction'"),
    "log_drift": ({"log_drift": True}, "log_drift=True.*set it to False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_before_anything_is_loaded(name, tmp_path, monkeypatch, capsys):
    """In Python an error, from the command line one line and exit code 2; DeepSpeed need not be there."""
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    settings, message = REFUSED[name]
    if name != "clip_scope":
        settings = {"clip_scope": "global", **settings}
    with pytest.raises(ValueError, match=message):
        LoPTConfig(**training_args(tmp_path, **settings))
    options = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as exit_of:
        sft(["--model_name_or_path", "nowhere", "--dataset_name", "x", "--output_dir", str(tmp_path), *options])
    assert exit_of.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
