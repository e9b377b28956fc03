"""Agreement with the released LoPT code: losses, logits and every gradient norm of its fixtures."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from lopt_hf import LoPTConfig, LoPTTrainer
from tests.tiny import make_dataset, make_tokenizer
from tests.trainers.helpers import training_args

FIXTURES = [f"lopt_official_{family}_k{blocks}" for family in ("llama", "qwen2") for blocks in (2, 4)]


@pytest.fixture(params=FIXTURES)
def fixture(request, shared):
    reference = json.loads((shared / "reference/lopt_official.json").read_text())[request.param]
    return reference, load_file(shared / f"reference/{request.param}.safetensors")


def make_trainer(reference, tensors, tmp_path, local_backward):
    config = AutoConfig.for_model(reference["model_type"], **reference["config"])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    args = LoPTConfig(**training_args(tmp_path, num_blocks=reference["num_blocks"], local_backward=local_backward))
    trainer = LoPTTrainer(model, args, train_dataset=make_dataset(), processing_class=make_tokenizer())
    heads = {k.removeprefix("heads."): v for k, v in tensors.items() if k.startswith("heads.")}
    trainer.local_heads.load_state_dict(heads)
    return trainer


@pytest.mark.parametrize("local_backward", ["joint", "eager"])
def test_losses_and_gradients(fixture, tmp_path, local_backward):
    """Losses agree to 1e-6, gradient norms to 1e-5 relative, in the released code's joint mode and in ours."""
    reference, tensors = fixture
    trainer = make_trainer(reference, tensors, tmp_path, local_backward)
    assert [[block.start, block.stop] for block in trainer.blocks] == reference["block_ranges"]
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    batch = {name: tensors[name].clone() for name in ("input_ids", "attention_mask", "labels")}
    loss = trainer.training_step(trainer.model, batch)
    local_losses = [trainer._metrics["train"][f"local_loss/block_{i}"][0] for i in range(reference["num_blocks"] - 1)]
    aux_loss = sum(local_losses) / len(local_losses)
    assert loss.item() == pytest.approx(reference["task_loss"], rel=1e-6)
    assert aux_loss == pytest.approx(reference["aux_loss"], rel=1e-6)
    norms = {name: parameter.grad.norm().item() for name, parameter in trainer.model.named_parameters()}
    assert norms == pytest.approx(reference["grad_norms"], rel=1e-5)
    head_norms = {name: parameter.grad.norm().item() for name, parameter in trainer.local_heads.named_parameters()}
    assert head_norms == pytest.approx(reference["head_grad_norms"], rel=1e-5)


def test_logits(fixture, tmp_path):
    reference, tensors = fixture
    trainer = make_trainer(reference, tensors, tmp_path, "eager")
    trainer.model.eval()
    with torch.no_grad():
        logits = trainer.model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits
    torch.testing.assert_close(logits, tensors["logits"], rtol=1e-5, atol=1e-6)
