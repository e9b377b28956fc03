"""Healing: by SFTTrainer, LoPTTrainer and RepLTrainer, with and without adapters."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl import ModelConfig, SFTConfig, SFTTrainer

from lopt_hf import LoPTConfig, LoPTTrainer, RepLModel, RepLTrainer
from lopt_hf.repl.config import STOCK_OPERATORS
from lopt_hf.repl.surgery import remove_layers
from lopt_hf.repl.trainer import HealingConfig, heal
from tests.repl.helpers import INPUT_IDS, logits, make_repl, make_stock
from tests.tiny import make_dataset, make_tokenizer
from tests.trainers.helpers import training_args

LORA_AND_HEAD = {"use_peft": True, "lora_target_modules": "all-linear", "lora_modules_to_save": ["lm_head"]}


def make_trainer(kind, output_dir, model, peft_config=None, **overrides):
    config = {SFTTrainer: SFTConfig, RepLTrainer: SFTConfig, LoPTTrainer: LoPTConfig}[kind]
    return kind(
        model,
        config(**training_args(output_dir, **overrides)),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def snapshot(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model, before):
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", [SFTTrainer, LoPTTrainer])
@pytest.mark.parametrize("settings", [{"operator": "linear"}, {"operator": "branches"}])
def test_everything_learns(kind, settings, checkpointing, tmp_path):
    model = make_repl(**settings)
    before = snapshot(model)
    trainer = make_trainer(kind, tmp_path, model, gradient_checkpointing=checkpointing)
    trainer.train()
    assert set(before) - changed(model, before) == set(), "parameters have not changed"
    trainer.save_model(tmp_path / "model")
    loaded = RepLModel.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "phi3", "gpt2", "gpt_neox", "opt", "qwen3"])
def test_other_families_learn(family, tmp_path):
    model = make_repl(make_stock(family), operator="branches")
    before = snapshot(model)
    make_trainer(SFTTrainer, tmp_path, model).train()
    # Softmax does not see a key's bias.
    assert {name for name in set(before) - changed(model, before) if "k_proj.bias" not in name} == set()


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_coefficients_only(is_reloaded, tmp_path):
    model = make_repl(operator="branches", trainable="coefficients")
    if is_reloaded:
        model.save_pretrained(tmp_path / "model")
        model = RepLModel.from_pretrained(tmp_path / "model")
    before = snapshot(model)
    make_trainer(SFTTrainer, tmp_path, model).train()
    assert changed(model, before) == {f"model.layers.{index}.surrogate.coefficients" for index in (1, 3)}


@pytest.mark.parametrize("operator", STOCK_OPERATORS)
def test_a_stock_model_trains_after_coefficients_alone_did(operator):
    folded = make_repl(operator=operator, trainable="coefficients").merge_and_unload()
    assert all(parameter.requires_grad for parameter in folded.parameters())


@pytest.mark.parametrize("adapters", [{}, LORA_AND_HEAD], ids=["whole", "adapters"])
@pytest.mark.parametrize("kind", ["repl", "plain"])
def test_a_healed_model_is_itself_again(kind, adapters, tmp_path):
    """Of its class's own forward, not of bf16's and TRL's; and the modules that are named beside adapters learn."""
    model = make_stock()
    removed = [2] if kind == "plain" else []
    if removed:
        remove_layers(model, removed)
    else:
        model = make_repl(model)
    head = model.lm_head.weight.detach().clone()
    args = HealingConfig(**training_args(tmp_path, bf16=True, max_steps=2, save_strategy="steps", save_steps=1))
    healed = heal(model, 7, make_dataset(), args, ModelConfig(**adapters), make_tokenizer(), None, removed)
    assert healed.forward.__func__ is type(healed).forward
    assert healed.config.use_cache, "the trainer switches it off"
    assert logits(healed.eval()).dtype == torch.float32 and not torch.equal(healed.lm_head.weight, head)
    saved = (tmp_path / "healing").glob("*/checkpoint-*")
    assert sorted(folder.parts[-2:] for folder in saved) == [(f"{kind}-seed-7", f"checkpoint-{i}") for i in (1, 2)]


@pytest.mark.parametrize("operator", ["linear", "branches"])
def test_lora_and_coefficients(operator, tmp_path):
    """The surrogates follow their neighbours' adapters, so that merging them changes nothing."""
    model = make_repl(operator=operator)
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["surrogate"], init_lora_weights=False)
    trainer = make_trainer(SFTTrainer, tmp_path, model, peft_config=lora)
    before = snapshot(trainer.model)
    trainer.train()
    moved = changed(trainer.model, before)
    assert moved and all("lora_" in name or "modules_to_save" in name for name in moved)
    assert sum("surrogate.modules_to_save.default.coefficients" in name for name in moved) == 2
    expected = logits(trainer.model.eval())
    merged = trainer.model.merge_and_unload()
    assert isinstance(merged, RepLModel)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(merged.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


DORA = [("llama", "branches"), ("llama", "head+mlp"), ("llama", "down_proj"), ("gpt2", "branches")]


@pytest.mark.parametrize(("family", "operator"), DORA)
def test_dora_is_merged_as_it_was_trained(family, operator):
    """Each row has a length of its own, which the surrogates follow too."""
    lora = LoraConfig(
        r=4, target_modules="all-linear", modules_to_save=["surrogate"], use_dora=True, init_lora_weights=False
    )
    model = get_peft_model(make_repl(make_stock(family), operator=operator), lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("saved", ["ln_1", "c_proj", "c_attn"])
def test_neighbours_that_learn_beside_adapters_are_read_as_they_are(saved):
    """A norm with its bias, and GPT-2's projections, transposed as they are, from the copies that PEFT trains."""
    lora = LoraConfig(r=4, target_modules=["c_fc"], modules_to_save=["surrogate", saved])
    model = get_peft_model(make_repl(make_stock("gpt2"), operator="branches"), lora).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name and saved in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_blocks_count_the_layers_that_are_left(tmp_path):
    """Four of six layers are left: two in each block, each with its own surrogate, and no gradient crosses."""
    trainer = make_trainer(LoPTTrainer, tmp_path, make_repl(operator="branches"), num_blocks=2)
    assert [(block.start, block.stop) for block in trainer.blocks] == [(0, 2), (2, 4)]
    early, late = trainer.learner.owned()
    assert "model.layers.1.surrogate.coefficients" in early and "model.layers.3.surrogate.coefficients" in late
    trainer.train()  # the boundary checks the reach of the first losses


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_reach_the_sources_only_if_asked_to(detach):
    """With the two upper neighbours' attention cut off, their value projections learn through the surrogate alone."""
    model = make_repl(operator="branches", detach_sources=detach)
    before, after = model.model.layers[2], model.model.layers[3]
    with torch.no_grad():
        for layer in (before, after):
            layer.self_attn.register_forward_hook(lambda m, a, o: (o[0].detach() * 0, *o[1:]))
    model(INPUT_IDS, labels=INPUT_IDS).loss.backward()
    for layer in (before, after):
        assert (layer.self_attn.v_proj.weight.grad is None) == detach


def test_gradient_of_the_coefficients_is_that_of_the_loss():
    """Against a central difference, in float64 but for the norms, which the models compute in float32."""
    model = make_repl(make_stock().double(), operator="branches")
    coefficients = model.surrogates[1].coefficients

    def loss():
        logits_BTV = model(INPUT_IDS).logits
        return torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), INPUT_IDS[:, 1:].flatten())

    (gradient,) = torch.autograd.grad(loss(), [coefficients])
    step = 1e-3
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            coefficients[1, 5] += sign * step
            values.append(loss())
            coefficients[1, 5] -= sign * step
    assert gradient[1, 5].item() == pytest.approx(((values[0] - values[1]) / (2 * step)).item(), rel=1e-2)


def test_without_a_teacher_the_trainer_is_the_stock_one(tmp_path):
    ours, stock = make_repl(), make_repl()
    make_trainer(RepLTrainer, tmp_path / "ours", ours).train()
    make_trainer(SFTTrainer, tmp_path / "stock", stock).train()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), stock.parameters(), strict=True))


@pytest.mark.parametrize("kind", [SFTTrainer, LoPTTrainer])
def test_resuming_ends_where_the_whole_run_does(kind, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_repl(operator="branches")
    make_trainer(kind, tmp_path, whole, **saving).train()
    resumed = make_repl(operator="branches")
    make_trainer(kind, tmp_path, resumed, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
