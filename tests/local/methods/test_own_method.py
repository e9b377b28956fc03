"""The method of `own_method.py` runs in every trainer, in the pipeline and in the planner, none of which knows it."""

import inspect

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt_hf import LocalDPOTrainer, LocalSFTTrainer
from lopt_hf.planner.simulation import simulate
from lopt_hf.planner.step import Workload
from lopt_hf.planner.strategies import Strategy
from tests.distributed.pipeline_processes import Processes
from tests.local.methods import own_method
from tests.local.methods.own_method import StayCloseArguments, StayCloseDPOConfig, StayCloseSFTConfig
from tests.local.methods.own_method_worker import make_settings, run_rank
from tests.tiny import make_dataset, make_model, make_pairs, make_tokenizer
from tests.trainers.helpers import one_step_gradients, training_args


def make_sft(output_dir, **settings):
    args = StayCloseSFTConfig(**training_args(output_dir, **settings))
    return LocalSFTTrainer(make_model(), args, train_dataset=make_dataset(), processing_class=make_tokenizer())


def test_the_method_is_short():
    assert len(inspect.getsource(own_method).splitlines()) < 60


def test_sft_trains_each_block_by_its_own_loss(tmp_path):
    """Against the gradients of the losses written out, with `detach` at the boundary."""
    trainer = make_sft(tmp_path, closeness=0.3)
    ours = one_step_gradients(trainer)
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    model, head = make_model(), trainer.local_heads["0"]
    tokens = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    states = model(**tokens, output_hidden_states=True).hidden_states
    added_BTD = head(states[2]) - states[0].detach()
    (0.3 * added_BTD.square().mean() / states[0].detach().square().mean()).backward()
    for name, parameter in list(model.model.layers[:2].named_parameters()):
        torch.testing.assert_close(ours[f"model.layers.{name}"], parameter.grad, rtol=1e-4, atol=1e-7)
    assert all(ours[f"model.layers.{i}.mlp.up_proj.weight"].any() for i in (2, 3))  # from the task
    assert ours["head.0.weight"].any()


def test_dpo(tmp_path):
    args = StayCloseDPOConfig(**training_args(tmp_path))
    given = {"train_dataset": make_pairs(), "processing_class": make_tokenizer(), "ref_model": make_model()}
    trainer = LocalDPOTrainer(make_model(), args=args, **given)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    still = {name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])}
    assert still <= {"model.embed_tokens.weight"}
    assert any("local_loss/block_0" in row for row in trainer.state.log_history)


def test_a_run_resumes_and_another_weight_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    whole = make_sft(tmp_path / "whole", max_steps=2)
    whole.train()
    make_sft(tmp_path / "cut", max_steps=2, **saving).train()
    resumed = make_sft(tmp_path / "resumed", max_steps=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-1"))
    ends = [dict(trainer.model.named_parameters()) for trainer in (whole, resumed)]
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())
    other = make_sft(tmp_path / "other", max_steps=2, closeness=0.2)
    with pytest.raises(ValueError, match="trained with closeness=0.1, but this run has closeness=0.2"):
        other.train(resume_from_checkpoint=str(tmp_path / "cut/checkpoint-1"))


def test_bad_input():
    with pytest.raises(ValueError, match="closeness=-1.0"):
        StayCloseSFTConfig("out", closeness=-1.0)


def test_the_pipeline_ends_with_the_weights_of_one_process(tmp_path):
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    processes = Processes([[str(tmp_path)]] * 2, tmp_path / "logs", target=run_rank)
    codes = processes.wait(120)
    assert codes == [0, 0], [processes.output(rank)[-3000:] for rank in range(2)]
    trainer = make_sft(tmp_path / "one", **make_settings())
    trainer.train()
    pipeline = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).named_parameters())
    different = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, pipeline[n])]
    assert not different


def test_the_planner_plans_it():
    config = make_model(num_hidden_layers=8).config
    own = Strategy("stay close", "own", num_blocks=4, settings=StayCloseArguments(num_blocks=4))
    workload = Workload(2, 32, torch.float32)
    (planned,), (end_to_end,) = simulate(config, own, workload), simulate(config, Strategy("e2e", "e2e"), workload)
    heads = 3 * (config.hidden_size**2 + config.hidden_size)
    assert planned.trainable == end_to_end.trainable + heads
    assert planned.saved_bytes < 0.6 * end_to_end.saved_bytes
