"""Healing with the full model as a teacher: what is learnt, what stays as it is, and what is in memory."""

import copy

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from lopt_hf import RepLTrainer
from lopt_hf.repl.distillation import chunked_divergence
from lopt_hf.repl.surgery import remove_layers
from lopt_hf.repl.trainer import HealingConfig, PlainHealingTrainer
from tests.repl.helpers import logits, make_repl, make_stock
from tests.tiny import make_dataset, make_tokenizer
from tests.trainers.helpers import training_args

SPAN = {"layers_to_replace": None, "spans": [[2, 4]]}
TAUGHT = {"teacher_logits_weight": 0.7, "teacher_hidden_weight": 0.4, "task_loss_weight": 0.5}


def make_trainer(output_dir, family="llama", operator="down_proj", peft_config=None, **overrides):
    arguments = {**training_args(output_dir), **TAUGHT, **overrides}
    return RepLTrainer(
        make_repl(make_stock(family), operator=operator, **SPAN),
        HealingConfig(**arguments),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        teacher=make_stock(family),
    )


@pytest.mark.parametrize("task_weight", [0.5, 0.0])
@pytest.mark.parametrize("num_items", [None, 50])
@pytest.mark.parametrize(("family", "operator"), [("llama", "down_proj"), ("gemma2", "linear")])
def test_gradients_are_those_of_the_whole_matrix_of_logits(
    family, operator, num_items, task_weight, tmp_path, monkeypatch
):
    """Gemma 2 caps its logits. The reference takes both models' own logits and hidden states."""
    overrides = {"teacher_temperature": 2.0, "task_loss_weight": task_weight}
    if family == "gemma2":  # whose layers alternate: a span is one layer
        monkeypatch.setitem(SPAN, "spans", [[2, 3]])
    trainer = make_trainer(tmp_path, family, operator, **overrides)
    (first, end), model = SPAN["spans"][0], trainer.model.train()
    trainer.max_logits = 3 * model.config.vocab_size  # three tokens at a time
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.current_gradient_accumulation_steps = 2
    trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()

    teacher, behind = make_stock(family), []
    hook = model.model.layers[first].register_forward_pre_hook(lambda m, args: behind.append(args[0]))
    student = model(**batch, use_cache=False)
    hook.remove()
    with torch.no_grad():
        taught = teacher(**batch, output_hidden_states=True, use_cache=False)
    counted = batch["labels"][:, 1:] != -100
    divisor = counted.sum() if num_items is None else num_items
    rows = [each.logits[:, :-1][counted] for each in (student, taught)]
    task = F.cross_entropy(rows[0], batch["labels"][:, 1:][counted], reduction="sum") / divisor
    p, q = (row.div(2).softmax(-1) for row in reversed(rows))
    divergence = 4 * (p * (p / q).log()).sum() / divisor
    before, target = (taught.hidden_states[place] for place in (first, end))
    relative = (behind[0] - target).square().sum(-1) / (target - before).square().sum(-1)
    distance = relative[batch["attention_mask"].bool()].mean() / (1 if num_items is None else 2)
    (task_weight * task + 0.7 * divergence + 0.4 * distance).backward()
    assert counted.sum() > 6
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


class _Largest(TorchDispatchMode):
    """The most numbers of any tensor (tokens, vocabulary); the LM head's weight transposed is none."""

    def __init__(self, vocabulary, hidden_size):
        super().__init__()
        self.vocabulary, self.hidden_size, self.numbers = vocabulary, hidden_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            shape = tensor.shape if isinstance(tensor, torch.Tensor) else ()
            if shape[-1:] == (self.vocabulary,) and shape[0] != self.hidden_size:
                self.numbers = max(self.numbers, tensor.numel())
        return made


def test_logits_never_exist_as_a_whole():
    student, teacher = make_stock(), make_stock()
    vocabulary, size = student.config.vocab_size, student.config.hidden_size
    hidden, taught = torch.randn(2, 64, size)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        divergence = chunked_divergence(student, teacher, hidden.requires_grad_(), taught, max_logits=4 * vocabulary)
    assert sum(saved) < 64 * vocabulary, "only hidden states are kept for the backward"
    with _Largest(vocabulary, size) as largest:
        chunked_divergence(student, teacher, hidden, taught, max_logits=4 * vocabulary).backward()
    assert largest.numbers == 4 * vocabulary
    assert divergence.item() > 0 and teacher.get_output_embeddings().weight.grad is None


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({"teacher_logits_weight": 0.7, "teacher_hidden_weight": 0.0}, False),
        ({"teacher_logits_weight": 0.0, "teacher_hidden_weight": 0.4}, True),  # the head has no other gradient
        ({"task_loss_weight": 0.5}, True),
    ],
)
def test_a_task_loss_without_weight_has_no_backward(settings, runs, tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **{"task_loss_weight": 0.0, **settings})
    ran, original = [], SFTTrainer.compute_loss

    def spied(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        loss.register_hook(ran.append)
        return loss

    monkeypatch.setattr(SFTTrainer, "compute_loss", spied)
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model.train(), batch).backward()
    assert bool(ran) == runs
    assert all(parameter.grad is not None for parameter in trainer.model.parameters() if parameter.requires_grad)


def test_a_model_like_its_teacher_has_nothing_to_learn(tmp_path):
    stock = make_stock()
    trainer = PlainHealingTrainer(
        copy.deepcopy(stock),
        HealingConfig(**training_args(tmp_path), teacher_logits_weight=1.0, task_loss_weight=0.0),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        teacher=stock,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.model.train(), batch).item() == pytest.approx(0, abs=1e-5)


def test_both_distances_fall_and_the_teacher_stays_as_it_is(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=8, learning_rate=1e-3, task_loss_weight=0.0, save_strategy="steps")
    teacher = trainer._teacher
    before = copy.deepcopy(teacher.state_dict())
    trainer.train()
    for name in ("teacher_divergence", "teacher_distance"):
        values = [log[name] for log in trainer.state.log_history if name in log]
        assert len(values) > 1 and values[-1] < values[0], name
    assert not teacher.training and all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    saved = load_file(tmp_path / "checkpoint-8/model.safetensors")
    assert set(saved) <= set(trainer.model.state_dict()), "the teacher is not saved"
    folded = trainer.model.merge_and_unload()
    folded.save_pretrained(tmp_path / "folded")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "folded")
    assert type(stock).__name__ == "LlamaForCausalLM" and stock.config.num_hidden_layers == 4
    torch.testing.assert_close(logits(stock.eval()), logits(folded))


def test_plain_removal_learns_from_the_teacher_too(tmp_path):
    teacher, pruned = make_stock(), make_stock()
    remove_layers(pruned, [2, 3])
    trainer = PlainHealingTrainer(
        pruned,
        HealingConfig(**training_args(tmp_path, max_steps=8, learning_rate=1e-3), teacher_hidden_weight=1.0),
        train_dataset=make_dataset(),
        processing_class=make_tokenizer(),
        teacher=teacher,
        removed_spans=[(2, 4)],
    )
    trainer.train()
    distances = [log["teacher_distance"] for log in trainer.state.log_history if "teacher_distance" in log]
    assert distances[-1] < distances[0]
    assert distances[0] == pytest.approx(1, abs=0.2), "nothing stands where the layers were"


def test_adapters_learn_and_merge_to_a_stock_model(tmp_path):
    lora = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["surrogate"])
    trainer = make_trainer(tmp_path, peft_config=lora, max_steps=3, learning_rate=1e-2)
    trainer.train()
    assert any("teacher_divergence" in log for log in trainer.state.log_history)
    expected = logits(trainer.model.eval())
    folded = trainer.model.merge_and_unload().merge_and_unload()
    assert type(folded).__name__ == "LlamaForCausalLM"
    torch.testing.assert_close(logits(folded), expected, rtol=1e-4, atol=1e-4)


def test_resuming_ends_where_the_whole_run_does(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = make_trainer(tmp_path, **saving)
    whole.train()
    resumed = make_trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"teacher_logits_weight": -1.0}, "teacher_logits_weight=-1.0 must be a number from 0 on"),
        ({"teacher_hidden_weight": float("nan")}, "teacher_hidden_weight=nan must be"),
        ({"teacher_logits_weight": 1.0, "teacher_temperature": 0.0}, "teacher_temperature=0.0 must be above 0"),
        ({"teacher_hidden_weight": 1.0, "teacher_temperature": 2.0}, "no effect without teacher_logits_weight"),
        ({"task_loss_weight": 0.5}, "task_loss_weight=0.5 has no effect"),
    ],
)
def test_settings_that_cannot_work(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        HealingConfig(**training_args(tmp_path), **settings)


def test_hidden_states_behind_no_span(tmp_path):
    with pytest.raises(ValueError, match="teacher_hidden_weight=1.0 compares .* behind removed_spans, of which there"):
        PlainHealingTrainer(
            make_stock(),
            HealingConfig(**training_args(tmp_path), teacher_hidden_weight=1.0),
            train_dataset=make_dataset(),
            processing_class=make_tokenizer(),
            teacher=make_stock(),
        )


@pytest.mark.parametrize(
    ("settings", "teacher", "message"),
    [
        ({"teacher_logits_weight": 1.0}, None, "teacher is missing"),
        ({}, {}, "teacher has no effect"),
        ({"teacher_logits_weight": 1.0}, {"num_hidden_layers": 7}, "teacher has 7 layers .* one with 6 layers"),
    ],
)
def test_teachers_that_cannot_teach(settings, teacher, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        RepLTrainer(
            make_repl(operator="down_proj", **SPAN),
            HealingConfig(**training_args(tmp_path), **settings),
            train_dataset=make_dataset(),
            processing_class=make_tokenizer(),
            teacher=None if teacher is None else make_stock(**teacher),
        )
