"""What SFTTrainer's users expect to work with MLAAN, for every architecture."""

import gc
import json
import math
import weakref
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq

from lopt_hf import MLAANConfig
from lopt_hf.local.methods.mlaan import memory
from tests.local.methods.mlaan.helpers import gradients_of, make_mlaan_trainer
from tests.tiny import FAMILIES, make_dataset, make_model, make_tokenizer
from tests.trainers.helpers import make_stock_trainer

INPUT_IDS = torch.arange(3, 27).reshape(2, 12)


def trainable(trainer):
    heads = {f"head.{n}": p for n, p in trainer.local_heads.named_parameters()}
    model = dict(trainer.model.named_parameters())
    return {name: p.detach().clone() for name, p in {**model, **heads}.items() if p.requires_grad}


def unmoved(trainer):
    before = trainable(trainer)
    trainer.train()
    after = trainable(trainer)
    return {name for name in before if torch.equal(before[name], after[name])}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_moves_and_the_checkpoint_is_stock(family, tmp_path):
    trainer = make_mlaan_trainer(tmp_path, make_model(family), num_blocks=3, window=2)
    assert {name for name in unmoved(trainer) if not name.endswith("k_proj.bias")} == set()
    trainer.save_model(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    stock = make_stock_trainer(tmp_path / "sft", make_model(family)).model.eval()
    untrained = make_mlaan_trainer(tmp_path / "new", make_model(family)).model.eval()
    with torch.no_grad():
        assert torch.equal(loaded.eval()(INPUT_IDS).logits, trainer.model.eval()(INPUT_IDS).logits)
        assert torch.equal(untrained(INPUT_IDS).logits, stock(INPUT_IDS).logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True, "max_length": 64},
        {"padding_free": True, "max_length": None},
        {"completion_only_loss": False},
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "bf16": True, "gradient_accumulation_steps": 2, "window": 3},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}, "window": 1},
        {"neftune_noise_alpha": 5.0},
        {"readout": "trainable", "ema_layers": "all"},
        {"readout": "ema", "leap": "calibrate"},
        {"clip_scope": "global", "early_learning_rate": 1e-2, "log_drift": True},
        {"tied_embeddings": "freeze", "combine": "sum", "auxiliary_checkpointing": False},
    ],
    ids=lambda settings: "-".join(map(str, settings.items()))[:60],
)
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_every_trainable_parameter_moves(tmp_path, settings, peft):
    kwargs = {"peft_config": LoraConfig(target_modules="all-linear", init_lora_weights=False)} if peft else {}
    trainer = make_mlaan_trainer(tmp_path, make_model("qwen2"), trainer_kwargs=kwargs, **settings)
    assert {name for name in unmoved(trainer) if not name.endswith("k_proj.bias")} == set()
    for name in ("block_0/cascaded", "block_2/independent", "block_1/start"):
        values = [row[f"local_loss/{name}"] for row in trainer.state.log_history if f"local_loss/{name}" in row]
        assert values and all(map(math.isfinite, values))


def test_checkpointing_does_not_change_the_gradients(tmp_path):
    plain = gradients_of(make_mlaan_trainer(tmp_path, num_blocks=4, window=3))
    again = gradients_of(make_mlaan_trainer(tmp_path, num_blocks=4, window=3, gradient_checkpointing=True))
    for name, gradient in plain.items():
        assert (gradient is None) == (again[name] is None)
        if gradient is not None:
            torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-9)


def test_batch_1_accumulated_8_times_equals_batch_8(tmp_path):
    """Also where the rows have different numbers of labels: each token weighs the same."""
    rows = Dataset.from_dict({"input_ids": [[3 + (i * j) % 70 for j in range(1, 9 + i % 8)] for i in range(1, 33)]})
    shapes = [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"per_device_train_batch_size": 8},
    ]
    runs = [
        make_mlaan_trainer(tmp_path / str(i), trainer_kwargs={"train_dataset": rows}, translator="none", **shape)
        for i, shape in enumerate(shapes)
    ]
    one, other = (trainable(trainer) for trainer in runs if trainer.train())
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("settings", [{}, {"leap": "calibrate", "readout": "ema", "gradient_accumulation_steps": 2}])
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, settings):
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "num_blocks": 3}

    def final(output_dir: Path):
        last = output_dir / "checkpoint-6"
        state = json.loads((last / "trainer_state.json").read_text())["log_history"]
        clock = ("runtime", "per_second", "train_loss")
        log = [{k: v for k, v in row.items() if not any(c in k for c in clock)} for row in state]
        heads = load_file(last / "local_heads.safetensors")
        return {**load_file(last / "model.safetensors"), **{f"head.{n}": v for n, v in heads.items()}}, log

    make_mlaan_trainer(tmp_path / "whole", **settings).train()
    make_mlaan_trainer(tmp_path / "cut", **{**settings, "max_steps": 3}, lr_scheduler_type="constant")
    first = make_mlaan_trainer(tmp_path / "cut", **settings)
    stop = first.callback_handler.callbacks[0].__class__

    class StopAt3(stop):
        def on_step_end(self, args, state, control, **kwargs):
            control = super().on_step_end(args, state, control, **kwargs) or control
            control.should_training_stop = state.global_step == 3
            return control

    first.add_callback(StopAt3())
    first.train()
    make_mlaan_trainer(tmp_path / "cut", **settings).train(resume_from_checkpoint=True)
    (weights, log), (resumed, resumed_log) = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert weights.keys() == resumed.keys() and any("averages" in name for name in weights)
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    assert log == resumed_log and "local_loss/block_0/start" in log[0]


def test_a_checkpoint_with_another_window_is_refused(tmp_path):
    make_mlaan_trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="window=2, but this run has window=1"):
        make_mlaan_trainer(tmp_path, window=1).train(resume_from_checkpoint=True)


def test_a_checkpoint_with_another_readout_is_refused(tmp_path):
    """The frozen norm and LM head are in no file: they are those of the model that a run starts from."""
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    make_mlaan_trainer(tmp_path, **settings).train()
    trained = type(make_model()).from_pretrained(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match="final norm and LM head that are not"):
        make_mlaan_trainer(tmp_path, trained, **settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="readout=frozen, but this run has readout=ema"):
        make_mlaan_trainer(tmp_path, readout="ema", **settings).train(resume_from_checkpoint=True)


def test_a_collator_of_the_users_own_calibrates_on_what_it_trains_on(tmp_path):
    """One that pads all that it is given, and so cannot take the columns of text beside."""
    tokenizer = make_tokenizer()
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    rows = [{"input_ids": tokenizer(text)["input_ids"], "text": text} for text in make_dataset()["completion"]]
    dataset = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
    trainer = make_mlaan_trainer(tmp_path, trainer_kwargs={"train_dataset": dataset, "data_collator": collator})
    assert trainer.start_losses
    trainer.train()


def test_a_trainer_is_freed_before_its_model(tmp_path):
    model = make_model()
    trainer = make_mlaan_trainer(tmp_path, model)
    trainer.train()
    freed, layers = weakref.ref(trainer), trainer.stack.layers
    del trainer
    gc.collect()
    assert freed() is None
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in layers)


def test_memory_is_stated_and_checked(tmp_path, monkeypatch, caplog):
    trainer = make_mlaan_trainer(tmp_path, num_blocks=2, window=1, leap_layers=[2])
    layer = sum(p.numel() for p in trainer.stack.layers[3].parameters())
    planned = memory.planned_bytes(trainer.stack.layers, [[2, 3]], [[2]], (400, 0), 4096)
    assert planned == {"copies": 4 * 4 * 2 * layer, "translators": 4 * 4096 * 2, "averages": 4 * layer, "readout": 400}
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    with pytest.raises(ValueError, match=r"need .* MB beside the model .* 0 MB that cpu has free.* Lower leap_layers"):
        make_mlaan_trainer(tmp_path, num_blocks=2, window=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 5}, "window=5 is more than num_blocks=4"),
        ({"window": 0}, "window=0 is too low; it must be at least 1"),
        ({"leap_layers": [1]}, r"leap_layers=\[1\] has 1 entries, but there are 3 early blocks"),
        ({"leap_layers": "three"}, "leap_layers='three' must be a list"),
        ({"leap_layers": [1, -1, 1]}, "must be a list"),
        ({"leap": "first"}, "leap='first' is unknown; choose one of even, last, calibrate"),
        ({"combine": "max"}, "combine='max' .* mean, sum"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 is too high; it must be at most 1"),
        ({"independent_weight": 0.0, "cascaded_weight": 0.0}, "cascaded_weight are both 0"),
        ({"leap_layers": [1, 1, 1], "leap_share": 0.9}, "leap_share=0.9 does nothing with leap_layers=.1, 1, 1."),
        ({"leap_layers": [[3], [3], 0], "leap": "last"}, "leap='last' does nothing with leap_layers="),
        ({"window": 4, "readout": "ema"}, "readout='ema' does nothing with window=4, all of num_blocks=4"),
        ({"fsdp": True}, "MLAAN does not work under FSDP2.*DDP"),
        ({"optim": "lomo"}, "MLAAN does not work under optim='lomo'"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "window=2 does not work with reentrant activation checkpointing.*use_reentrant",
        ),
        ({"use_liger_kernel": True}, "window=2 does not work with use_liger_kernel=True"),
        ({"activation_offloading": True}, "window=2 does not work with activation_offloading=True"),
        ({"window": 1, "task_reach": 3, "use_liger_kernel": True}, "does not work with use_liger_kernel=True"),
        ({"window": 1, "torch_compile": True}, "MLAAN does not work with torch.compile"),
    ],
)
def test_options_are_checked(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        MLAANConfig(str(tmp_path), **settings)


@pytest.mark.parametrize(
    "settings",
    [{"window": 1, "use_liger_kernel": True}, {"window": 4, "torch_compile": True, "activation_offloading": True}],
)
def test_options_that_go_along(tmp_path, settings):
    MLAANConfig(str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "dtype", "warns"),
    [
        ({}, torch.bfloat16, True),
        ({}, torch.float32, False),
        ({"ema_decay": 0.5}, torch.bfloat16, False),
        ({"readout": "ema", "leap_layers": [0]}, torch.bfloat16, True),
        ({"leap_layers": [0]}, torch.bfloat16, False),
    ],
)
def test_averages_that_rounding_holds_are_named(tmp_path, caplog, settings, dtype, warns):
    """In bf16 a step of a two-hundredth of the distance is lost but where the distance is large."""
    make_mlaan_trainer(tmp_path, make_model().to(dtype), num_blocks=2, window=1, **settings)
    assert ("in bfloat16 weights the moving averages hardly move" in caplog.text) == warns


def test_leaps_from_a_command_line(tmp_path):
    assert MLAANConfig(str(tmp_path), leap_layers="[3, 2, 1]").leap_layers == [3, 2, 1]
    assert MLAANConfig(str(tmp_path), num_blocks=3, leap_layers=((2, 3), (3,))).leap_layers == [[2, 3], [3]]


def test_a_block_without_trainable_parameters(tmp_path):
    model = make_model()
    for parameter in [*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()]:
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match=r"no parameter of block 0 \(layers 0 to 0\) is trainable"):
        make_mlaan_trainer(tmp_path, model)
