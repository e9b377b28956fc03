"""What SFTTrainer's users expect to work, and what each option of LoPTConfig changes."""

import gc
import math
import weakref

import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, LoraConfig
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from lopt_hf import LoPTTrainer
from tests.tiny import make_dataset, make_model, make_tokenizer
from tests.trainers.helpers import KINDS, make_stock_trainer, make_trainer, one_step_gradients, snapshot, training_args

every_kind = pytest.mark.parametrize("kind", KINDS)


def unmoved(trainer):
    before = snapshot(trainer)
    trainer.train()
    after = snapshot(trainer)
    return {name for name in before if torch.equal(before[name], after[name])}


def logged(trainer, name):
    return [row[name] for row in trainer.state.log_history if name in row]


def make_conversations():
    rows = [{"prompt": p, "completion": c} for p, c in zip(*make_dataset().to_dict().values(), strict=True)]
    turns = [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}] for r in rows
    ]
    return Dataset.from_dict({"messages": turns})


# ---- Whatever SFTTrainer takes ----


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "max_length": 64},
        {"packing": True, "packing_strategy": "wrapped", "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"completion_only_loss": False},
        {"loss_type": "dft"},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"neftune_noise_alpha": 5.0},
        {"label_smoothing_factor": 0.1},
        {"optim": "adafactor"},
        {"weight_decay": 0.1, "max_grad_norm": 0.0},
        {"num_blocks": 4, "local_backward": "joint", "bf16": True, "gradient_checkpointing": True},
    ],
    ids=lambda settings: "-".join(map(str, settings.items()))[:60],
)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_every_trainable_parameter_moves(tmp_path, settings, peft):
    kwargs = {"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights=False)} if peft else {}
    trainer = make_trainer(tmp_path, make_model("qwen2"), trainer_kwargs=kwargs, **settings)
    assert {name for name in unmoved(trainer) if not name.endswith("k_proj.bias")} == set()
    assert all(map(math.isfinite, logged(trainer, "local_loss/block_0")))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_accumulation_steps": 2, "bf16": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"num_blocks": 4, "local_backward": "joint", "optim": "adafactor"},
    ],
    ids=lambda settings: next(iter(settings)),
)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_every_trainable_parameter_moves_with_other_losses(tmp_path, kind, settings, peft):
    kwargs = {"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights=False)} if peft else {}
    make_model("qwen2").save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "base"), kwargs, kind, **settings)
    assert {name for name in unmoved(trainer) if not name.endswith("k_proj.bias")} == set()
    assert all(map(math.isfinite, logged(trainer, "local_loss/block_0")))


def test_assistant_only_loss(tmp_path):
    kwargs = {"train_dataset": make_conversations()}
    assert unmoved(make_trainer(tmp_path, assistant_only_loss=True, trainer_kwargs=kwargs)) == set()


def test_untied_frozen_and_reentrant(tmp_path):
    """Reentrant checkpointing over frozen embeddings: without an input that requires grad, block 0 would not learn."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(tmp_path, make_model("gpt2"), tied_embeddings="freeze", **checkpointing)
    assert unmoved(trainer) == set()


def test_model_as_string_evaluation_and_callbacks(tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    seen = []

    class Record(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs)

    kwargs = {"eval_dataset": make_dataset(8), "callbacks": [Record()], "processing_class": None}
    args = {"eval_strategy": "steps", "eval_steps": 3}
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "base"), trainer_kwargs=kwargs, **args)
    trainer.train()
    assert any("eval_loss" in logs for logs in seen) and any("local_loss/block_0" in logs for logs in seen)


def test_evaluation_loss_is_sft_trainers(tmp_path):
    ours = make_trainer(tmp_path / "a").evaluate(make_dataset(8))
    stock = make_stock_trainer(tmp_path / "b").evaluate(make_dataset(8))
    assert ours["eval_loss"] == stock["eval_loss"]


def test_plain_sft_arguments_are_accepted(tmp_path):
    args = SFTConfig(**training_args(tmp_path))
    trainer = LoPTTrainer(make_model(), args, train_dataset=make_dataset(), processing_class=make_tokenizer())
    assert trainer.args.num_blocks == 2 and trainer.args.learning_rate == 1e-3


@every_kind
def test_lora_adapter_is_saved_stock(kind, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    kwargs = {"peft_config": LoraConfig(target_modules="all-linear")}
    make_tokenizer().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", str(tmp_path / "base"), trainer_kwargs=kwargs, kind=kind)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    x = torch.arange(3, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x).logits, trainer.model.eval()(x).logits)


@every_kind
def test_optimizer_of_the_users_own_trains_the_heads_too(kind, tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make_trainer(tmp_path, model, trainer_kwargs={"optimizers": (optimizer, None)}, kind=kind)
    assert {name for name in unmoved(trainer) if name.startswith("head.")} == set()


@pytest.mark.parametrize("knows_embeddings", [True, False])
def test_optimizer_of_the_users_own_trains_what_is_untied_after_it(knows_embeddings, tmp_path):
    model = make_model(tie_word_embeddings=True)
    parameters = [p for name, p in model.named_parameters() if knows_embeddings or "embed_tokens" not in name]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    trainer = make_trainer(tmp_path, model, trainer_kwargs={"optimizers": (optimizer, None)})
    still = unmoved(trainer)
    assert ("lm_head.weight" in still) == ("model.embed_tokens.weight" in still) == (not knows_embeddings)


def test_optimizer_of_the_users_own_trains_what_an_earlier_trainer_untied(tmp_path):
    model = make_model(tie_word_embeddings=True)
    trainers = []
    for _ in range(2):  # a notebook's cell, run again
        optimizer = torch.optim.SGD([p for name, p in model.named_parameters() if name != "lm_head.weight"], lr=0.1)
        trainers.append(make_trainer(tmp_path, model, trainer_kwargs={"optimizers": (optimizer, None)}))
    assert "lm_head.weight" not in unmoved(trainers[1])


def test_an_optimizer_that_a_subclass_makes_trains_the_heads(tmp_path):
    class Mine(LoPTTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    trainer = make_trainer(tmp_path, trainer_class=Mine)
    assert {name for name in unmoved(trainer) if name.startswith("head.")} == set()
    with pytest.raises(ValueError, match="early_learning_rate=0.1 has no effect on an optimizer of your own"):
        make_trainer(tmp_path, trainer_class=Mine, early_learning_rate=0.1).train()


@pytest.mark.parametrize("settings", [{"reach_rate": "inverse"}, {"reach_unit": "run", "reach_anneal": True}])
def test_rates_of_blocks_follow_from_the_optimizers_own(settings, tmp_path):
    settings = {**settings, "task_reach": [2, 1], "local_objective": "none", "max_steps": 2}
    kwargs = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    trainer = make_trainer(tmp_path, trainer_kwargs=kwargs, **settings)
    trainer.train()
    factor = 2 if "reach_rate" in settings else 1
    of_first, of_last = trainer.learner.parameters_to_learn()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            early = any(parameter is p for p in of_first)
            assert early or any(parameter is p for p in of_last)
            assert group["initial_lr"] == pytest.approx(0.1 * factor if early else 0.1)


def test_optimizer_and_scheduler_of_the_users_own(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make_trainer(tmp_path, model, trainer_kwargs={"optimizers": (optimizer, scheduler)})
    assert {name for name in unmoved(trainer) if name.startswith("head.")} == set()


@pytest.mark.parametrize("full_eval", [True, False])
def test_the_model_is_on_its_device_before_anything_is_made_of_it(full_eval, tmp_path, monkeypatch):
    """transformers leaves that to `train` where evaluation is in bf16; a copy of the norm would stay behind."""
    moves = []
    monkeypatch.setattr(LoPTTrainer, "_move_model_to_device", lambda self, *_: moves.append(hasattr(self, "learner")))
    make_trainer(tmp_path, bf16_full_eval=full_eval)
    assert moves == [False]


def test_gradients_are_recorded_again_after_an_interrupted_forward(tmp_path):
    trainer = make_trainer(tmp_path, task_reach=[1, 2], local_objective="none")

    def interrupt(*_):
        assert not torch.is_grad_enabled()
        raise KeyboardInterrupt

    trainer.stack.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_an_optimizer_that_never_steps_the_heads_is_refused(optim, tmp_path):
    with pytest.raises(ValueError, match=f"optim='{optim}' steps the model's own parameters alone"):
        make_trainer(tmp_path, optim=optim)
    make_trainer(tmp_path, optim=optim, train_early_blocks=False)


@every_kind
def test_a_trainer_is_freed_before_its_model(kind, tmp_path):
    """The hooks on the model must not keep the trainer, and with it the optimizer's state."""
    model = make_model()
    trainer = make_trainer(tmp_path, model, kind=kind)
    trainer.train()
    freed, layers = weakref.ref(trainer), trainer.stack.layers
    del trainer
    gc.collect()
    assert freed() is None
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_prepared_data_with_a_collator_of_the_users_own(tmp_path):
    rows = Dataset.from_dict({"numbers": [[5, 6, 7, 8]] * 8})

    def collate(examples):
        ids = torch.tensor([example["numbers"] for example in examples])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    kwargs = {"train_dataset": rows, "data_collator": collate}
    options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    assert unmoved(make_trainer(tmp_path, trainer_kwargs=kwargs, **options)) <= {"model.embed_tokens.weight"}


@every_kind
def test_model_card_cites_the_paper(kind, tmp_path):
    trainer = make_trainer(tmp_path, kind=kind)
    trainer.create_model_card(model_name="tiny")
    card = (tmp_path / "README.md").read_text()
    assert "2605.04913" in card and "- lopt" in card and f"trained with {trainer._name}" in card


def test_batch_1_accumulated_8_times_equals_batch_8(tmp_path):
    rows = Dataset.from_dict({"input_ids": [[3 + (i * j) % 70 for j in range(1, 21)] for i in range(1, 33)]})
    kwargs = {"train_dataset": rows}
    shapes = [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8},
    ]
    runs = [make_trainer(tmp_path / str(i), trainer_kwargs=kwargs, **shape) for i, shape in enumerate(shapes)]
    for trainer in runs:
        trainer.train()
    one, other = map(snapshot, runs)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---- LoPTConfig's options ----


def test_split_at(tmp_path):
    trainer = make_trainer(tmp_path, num_blocks=3, split_at=[1, 3])
    assert [(block.start, block.stop) for block in trainer.blocks] == [(0, 1), (1, 3), (3, 4)]


def test_reconstruction_weight_scales_the_local_gradients_only(tmp_path):
    light, heavy = (
        one_step_gradients(make_trainer(tmp_path, local_backward="joint", reconstruction_weight=weight))
        for weight in (5.0, 10.0)
    )
    early, late = "model.layers.0.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"
    torch.testing.assert_close(heavy[early], 2 * light[early])
    assert torch.equal(heavy[late], light[late])


@pytest.mark.parametrize("mask", ["attention", "none"])
def test_reconstruction_mask(tmp_path, mask):
    """With the mask, what stands on padding does not matter."""
    trainer = make_trainer(tmp_path, local_backward="joint", reconstruction_mask=mask)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    assert not inputs["attention_mask"].all()
    losses = []
    for filler in (0, 9):
        batch = {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, filler)}
        trainer.compute_loss(trainer.model, batch)
        losses.append(trainer.boundary.losses[0][0].item())
    assert (losses[0] == pytest.approx(losses[1], rel=1e-6)) == (mask == "attention")


@every_kind
def test_early_learning_rate(kind, tmp_path):
    trainer = make_trainer(tmp_path, early_learning_rate=0.0, num_blocks=2, kind=kind)
    early = {name for block in trainer.learner.owned()[:-1] for name in block}
    still = unmoved(trainer)
    assert early <= still and "head.0.1.weight" in still
    assert not still & set(trainer.learner.owned()[-1])
    rates = {group["initial_lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0, 1e-3}


@every_kind
def test_local_update_interval(kind, tmp_path):
    """Early blocks move at steps 1 and 4 only, and the other steps build no graph below the boundary."""
    trainer = make_trainer(tmp_path, local_update_interval=3, max_steps=5, kind=kind)
    moved, graphs = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.before = snapshot(trainer)

        def on_step_end(self, *args, **kwargs):
            after = snapshot(trainer)
            moved.append({name for name in after if not torch.equal(after[name], self.before[name])})

    def record(module, args, output):
        if trainer.boundary._in_forward:
            graphs.append(output.requires_grad)

    trainer.stack.layers[1].mlp.register_forward_hook(record)
    trainer.add_callback(Watch())
    trainer.train()
    early = {name for block in trainer.learner.owned()[:-1] for name in block}
    assert [bool(step & early) for step in moved] == [True, False, False, True, False]
    assert all(step >= set(trainer.learner.owned()[-1]) for step in moved)
    assert graphs == [True, False, False, True, False]
    assert len(logged(trainer, "local_loss/block_0")) == 2


@every_kind
def test_freeze_control(kind, tmp_path):
    trainer = make_trainer(tmp_path, make_model("gpt2"), train_early_blocks=False, kind=kind)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    assert unmoved(trainer) == set()  # of what is trainable
    for name in trainer.learner.owned()[0]:
        assert torch.equal(start[name], trainer.model.get_parameter(name)), name
    assert len(trainer.local_heads) == 0 and "local_loss/block_0" not in trainer.state.log_history[0]


def test_tied_embeddings_freeze_keeps_the_checkpoints_layout(tmp_path):
    trainer = make_trainer(tmp_path, make_model("gpt2"), tied_embeddings="freeze")
    assert unmoved(trainer) == set()
    trainer.save_model(tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, make_model("gpt2").lm_head.weight)


@pytest.mark.parametrize("scope", ["block", "global"])
def test_clip_scope(tmp_path, scope):
    trainer = make_trainer(tmp_path, clip_scope=scope, max_grad_norm=0.1, max_steps=1)
    norms = {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            for index, group in enumerate(trainer.learner.parameters_to_learn()):
                norms[index] = torch.nn.utils.get_total_norm([p.grad for p in group]).item()

    trainer.add_callback(Watch())
    trainer.train()
    total = math.hypot(*norms.values())
    if scope == "global":
        assert total == pytest.approx(0.1, rel=1e-3)
    else:
        assert norms[1] == pytest.approx(0.1, rel=1e-3) and 0 < norms[0] <= 0.1001
    assert logged(trainer, "grad_norm")[0] > total


def test_log_drift(tmp_path):
    trainer = make_trainer(tmp_path, log_drift=True, logging_steps=1)
    start = snapshot(trainer)
    trainer.train()
    names = trainer.learner.owned()[0]
    moved = math.sqrt(sum((trainer.model.get_parameter(n) - start[n]).square().sum().item() for n in names))
    expected = moved / math.sqrt(sum(start[n].square().sum().item() for n in names))
    assert logged(trainer, "drift/block_0")[-1] == pytest.approx(expected, rel=1e-4)
    assert len(logged(trainer, "drift/block_1")) >= 3


def test_own_local_objective(tmp_path):
    class StayClose:
        def make_head(self, hidden_size):
            return torch.nn.Linear(hidden_size, hidden_size)

        def __call__(self, head, output_BTD, input_BTD, batch):
            assert set(batch.inputs) >= {"input_ids", "labels"}
            return (head(output_BTD) - input_BTD).square().mean()

    assert unmoved(make_trainer(tmp_path, trainer_kwargs={"local_objective": StayClose()})) == set()


@every_kind
def test_eager_and_joint_train_to_the_same_weights(kind, tmp_path):
    """Under accumulation too, where each trainer scales its losses in its own way."""
    weights = []
    for mode in ("eager", "joint"):
        settings = {"local_backward": mode, "gradient_accumulation_steps": 2, "max_steps": 2}
        trainer = make_trainer(tmp_path / mode, kind=kind, **settings)
        trainer.train()
        weights.append(snapshot(trainer))
    eager, joint = weights
    assert all(torch.equal(eager[name], joint[name]) for name in eager)


def test_boundary_is_inert_outside_the_trainer(tmp_path):
    """A gradient that the user computes on the trained model is end-to-end."""
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    x = torch.arange(3, 15)[None]
    trainer.model.zero_grad()
    trainer.model(input_ids=x, labels=x).loss.backward()
    assert trainer.model.model.layers[0].mlp.up_proj.weight.grad.any()
    trainer.boundary.remove()
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in trainer.stack.layers)


@pytest.mark.parametrize(
    ("settings", "trainer_kwargs", "warns"),
    [
        ({}, {}, True),
        ({"early_learning_rate": 1e-4}, {}, False),
        ({"train_early_blocks": False}, {}, False),
        ({}, {"peft_config": LoraConfig(target_modules="all-linear")}, False),
    ],
    ids=["one rate", "own rate", "frozen", "adapter"],
)
def test_warns_of_the_papers_single_rate(tmp_path, caplog, settings, trainer_kwargs, warns):
    make_trainer(tmp_path, trainer_kwargs=trainer_kwargs, **settings)
    assert ("Consider early_learning_rate=0.0001" in caplog.text) == warns


def test_bf16_weights_need_no_warning_of_the_rate(tmp_path, caplog):
    make_trainer(tmp_path, make_model().to(torch.bfloat16))
    assert "early_learning_rate" not in caplog.text


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_routers_that_run_again_in_the_backward_count_once(tmp_path, family, use_reentrant):
    """A checkpointed block runs again inside the model's forward, where router logits are being collected."""
    checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    models = [make_model(family, output_router_logits=True) for _ in range(2)]
    expected = one_step_gradients(make_trainer(tmp_path / "a", models[0], num_blocks=4))
    gradients = one_step_gradients(make_trainer(tmp_path / "b", models[1], num_blocks=4, **checkpointing))
    assert any(expected[name].any() for name in expected if "gate" in name)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@every_kind
def test_the_loss_in_the_log_is_the_tasks(kind, tmp_path):
    """A local loss that waits for the task's backward is a part of what is differentiated, not of what is shown."""
    shown = []
    for mode in ("eager", "joint"):
        settings = {"local_backward": mode, "gradient_accumulation_steps": 2, "max_steps": 2, "logging_steps": 1}
        torch.manual_seed(0)
        trainer = make_trainer(tmp_path / mode, kind=kind, **settings)
        trainer.train()
        logs = trainer.state.log_history
        shown.append([log.get("loss", log.get("train_loss")) for log in logs])
        assert all(log["local_loss/block_0"] > 0 for log in logs[:-1])
    assert len(shown[0]) == 3 and shown[0] == pytest.approx(shown[1], rel=1e-4, abs=1e-6)
