"""Training with `local_objective="readout"`."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lopt_hf import LoPTConfig
from lopt_hf.local.readout import ReadoutObjective
from lopt_hf.local.stacks import find_decoder_stack
from tests.tiny import FAMILIES, make_model
from tests.trainers.helpers import make_trainer, one_step_gradients, snapshot

INPUT_IDS = torch.arange(3, 27).reshape(2, 12)
every_family = pytest.mark.parametrize("family", FAMILIES)


def truncated(model, num_layers):
    """A stock model whose decoder ends after `num_layers` layers, with the same weights."""
    stock = type(model)(copy.deepcopy(model.config)).train()
    stock.load_state_dict({k: v.clone() for k, v in model.state_dict().items()})
    stack = find_decoder_stack(stock)
    del stack.layers[num_layers:]
    stock.config.num_hidden_layers = num_layers
    return stock


@every_family
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_blocks_gradient_is_that_of_the_stock_model_cut_off_after_it(family, checkpointing, tmp_path):
    settings = {"num_blocks": 3, "local_objective": "readout", "gradient_checkpointing": checkpointing}
    model = make_model(family, router_aux_loss_coef=0.0)  # which a truncated model would average over fewer layers
    trainer = make_trainer(tmp_path, model, **settings)
    assert trainer.boundary.mode == "eager"
    stocks = [truncated(trainer.model, block.stop) for block in trainer.blocks]
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    gradients = one_step_gradients(trainer)
    for stock, block, owned in zip(stocks, trainer.blocks, trainer.learner.owned(), strict=True):
        stock(**inputs).loss.backward()
        for name in owned:
            expected, gradient = stock.get_parameter(name).grad, gradients[name]
            expected = torch.zeros_like(gradient) if expected is None else expected
            torch.testing.assert_close(
                gradient, expected, rtol=1e-4, atol=1e-6, msg=lambda m, n=name, b=block: f"{b} {n}: {m}"
            )


@every_family
def test_every_parameter_moves_and_the_checkpoint_is_stock(family, tmp_path):
    trainer = make_trainer(tmp_path, make_model(family), local_objective="readout")
    before, start = snapshot(trainer), trainer.boundary.objective.fingerprint
    trainer.train()
    after = snapshot(trainer)
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    assert unmoved == [], f"Parameters have not changed: {unmoved}"
    del trainer.boundary.objective.fingerprint  # cached
    assert trainer.boundary.objective.fingerprint == start
    trainer.save_model(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(loaded.eval()(INPUT_IDS).logits, trainer.model.eval()(INPUT_IDS).logits)


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_the_weight_is_one_for_every_block(tmp_path, num_blocks):
    trainer = make_trainer(tmp_path, num_blocks=num_blocks, local_objective="readout")
    assert trainer.boundary.weight == 1.0
    own = ReadoutObjective.from_model(make_model())
    assert make_trainer(tmp_path, trainer_kwargs={"local_objective": own}).boundary.weight == 1.0


def test_the_local_loss_is_logged_and_falls(tmp_path):
    trainer = make_trainer(tmp_path, local_objective="readout", max_steps=20, learning_rate=1e-2)
    trainer.train()
    losses = [row["local_loss/block_0"] for row in trainer.state.log_history if "local_loss/block_0" in row]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("tied_embeddings", ["untie", "freeze"])
def test_tied_embeddings(tmp_path, tied_embeddings):
    """The head is read as it was at the start; one that stays frozen is not copied."""
    model = make_model(tie_word_embeddings=True)
    before = model.lm_head.weight.detach().clone()
    trainer = make_trainer(tmp_path, model, local_objective="readout", tied_embeddings=tied_embeddings)
    trainer.train()
    readout = dict(trainer.boundary.objective.readout.named_modules())["model.lm_head"]
    assert torch.equal(readout.weight, before)
    assert (readout.weight is model.lm_head.weight) == (tied_embeddings == "freeze")
    assert torch.equal(model.lm_head.weight, before) == (tied_embeddings == "freeze")


@pytest.mark.parametrize("modules_to_save", [None, ["lm_head"]])
def test_peft(tmp_path, modules_to_save):
    """The base model reads out, whatever the adapters on its head have learned."""
    config = LoraConfig(target_modules="all-linear", modules_to_save=modules_to_save, task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, local_objective="readout", trainer_kwargs={"peft_config": config})
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    assert trainer.boundary.objective.fingerprint == ReadoutObjective.from_model(make_model()).fingerprint


def resumable(output_dir, model=None, **settings):
    schedule = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    return make_trainer(output_dir, model, **{"local_objective": "readout", **schedule, **settings})


@pytest.mark.parametrize(
    "settings", [{}, {"trainer_kwargs": {"peft_config": LoraConfig(modules_to_save=["lm_head"])}}]
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings):
    resumable(tmp_path / "whole", **settings).train()
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    resumable(tmp_path / "resumed", **settings).train(resume_from_checkpoint=True)
    name = "adapter_model.safetensors" if settings else "model.safetensors"
    whole, resumed = (load_file(tmp_path / run / "checkpoint-6" / name) for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_resuming_with_the_trained_model_is_refused(tmp_path):
    """Its norm and head are not those that the run began to read through."""
    resumable(tmp_path, max_steps=3).train()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="pass the model that the run started from"):
        resumable(tmp_path, trained).train(resume_from_checkpoint=True)


def test_resuming_with_the_other_objective_is_refused(tmp_path):
    resumable(tmp_path, max_steps=3).train()
    with pytest.raises(ValueError, match="local_objective=ReadoutObjective, but this run has local_objective=Recon"):
        resumable(tmp_path, local_objective="reconstruction").train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reconstruction_weight": 5.0}, "reconstruction_weight=5.0 does nothing with local_objective='readout'"),
        ({"reconstruction_bottleneck": 2}, "reconstruction_bottleneck=2 does nothing"),
        ({"reconstruction_mask": "none"}, "reconstruction_mask='none' does nothing"),
        (
            {"fsdp": True, "fsdp_config": {"version": 1}},
            "local_objective='readout' does not work under FSDP1.*use FSDP2",
        ),
        ({"local_objective": "contrastive"}, "local_objective='contrastive' .* reconstruction, readout"),
    ],
)
def test_options_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        LoPTConfig(str(tmp_path), **{"local_objective": "readout", **settings})
