"""One clear error, early, that names the field, its value and the fix."""

import pytest
import torch
from datasets import Dataset
from peft import PrefixTuningConfig
from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, BertConfig, BitsAndBytesConfig, T5Config
from trl import SFTConfig

from lopt_hf import (
    LocalDPOTrainer,
    LocalGRPOTrainer,
    LocalSFTTrainer,
    LoPTConfig,
    LoPTDPOTrainer,
    LoPTTrainer,
    MLAANConfig,
    MLAANTrainer,
)
from lopt_hf.rewards import gsm8k_reward
from lopt_hf.scripts import dpo, grpo, sft
from tests.tiny import make_model, make_pairs
from tests.trainers.helpers import KINDS, make_trainer

every_kind = pytest.mark.parametrize("kind", KINDS)
FSDP1 = {"fsdp": True, "fsdp_config": {"version": 1}}
COMMANDS = {"sft": sft, "dpo": dpo, "grpo": grpo}


@every_kind
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 1}, "num_blocks=1 .* at least 2"),
        ({"num_blocks": 3, "split_at": [3, 2]}, r"split_at=\[3, 2\] must be strictly increasing"),
        ({"split_at": [1, 2]}, r"split_at=\[1, 2\] .* set num_blocks to 3"),
        ({"split_at": [0]}, r"split_at=\[0\]"),
        ({"reconstruction_weight": -1.0}, "reconstruction_weight=-1.0"),
        ({"reconstruction_weight": float("nan")}, "reconstruction_weight=nan must be a finite number"),
        ({"reconstruction_bottleneck": 0}, "reconstruction_bottleneck=0"),
        ({"local_update_interval": 0}, "local_update_interval=0 .* at least 1"),
        ({"early_learning_rate": -1e-5}, "early_learning_rate=-1e-05"),
        ({"num_blocks": 2.5}, "num_blocks=2.5 must be an integer"),
        ({"split_at": [1.5]}, r"split_at=\[1.5\] must be a list of integers"),
        ({"early_learning_rate": "1e-5"}, "early_learning_rate='1e-5' must be a finite number"),
        ({"local_backward": "lazy"}, "local_backward='lazy' .* auto, eager, joint"),
        ({"clip_scope": "layer"}, "clip_scope='layer' .* block, global"),
        ({"tied_embeddings": "tie"}, "tied_embeddings='tie' .* untie, freeze"),
        ({"reconstruction_mask": "labels"}, "reconstruction_mask='labels' .* attention, none"),
        ({"local_backward": "eager", **FSDP1}, "local_backward='eager' .* FSDP1.*'joint'"),
        (
            {"local_backward": "eager", "optim": "lomo"},
            "local_backward='eager' does not work under optim='lomo'.*'joint'",
        ),
        (
            {"local_step": True, "clip_scope": "global"},
            "local_step=True .* clip_scope='global'.*clip_scope to 'block'",
        ),
        (
            {"early_learning_rate": 1e-6, "optim": "galore_adamw_layerwise"},
            "early_learning_rate=1e-06 has no effect with optim='galore_adamw_layerwise'.*leave it out",
        ),
        (
            {"reach_rate": "sqrt", "task_reach": [2, 1], "optim": "apollo_adamw_layerwise"},
            "reach_rate='sqrt' has no effect with optim='apollo_adamw_layerwise'",
        ),
        ({"local_step": True, "local_backward": "joint"}, "local_step=True .* local_backward='joint'.*'eager'"),
        (
            {"local_step": True, "optim": "lomo"},
            "local_step=True .* optim='lomo'.*choose another, or set local_step to",
        ),
        ({"local_step": True, "optim": "galore_adamw_layerwise"}, "local_step=True .* optim='galore_adamw_layerwise'"),
        ({"local_step": True, **FSDP1}, "local_step=True .* FSDP1.*use FSDP2 with TRANSFORMER_BASED_WRAP, DDP or"),
        (
            {"task_reach": 2, **FSDP1},
            "task_reach=.2. does not work under FSDP1.*FSDP2 with TRANSFORMER_BASED_WRAP",
        ),
        ({"early_learning_rate": True}, "early_learning_rate=True must be a finite number"),
        ({"split_at": [True]}, "split_at=.True. must be a list of integers"),
        (
            {"train_early_blocks": False, "early_learning_rate": 1e-6},
            "early_learning_rate=1e-06 does nothing .* frozen",
        ),
        (
            {"train_early_blocks": False, "local_update_interval": 4},
            "local_update_interval=4 .* train_early_blocks to T",
        ),
        ({"train_early_blocks": False, "reconstruction_weight": 3.0}, "reconstruction_weight=3.0 does nothing where"),
        ({"local_objective": "none", "early_learning_rate": 1e-6}, "early_learning_rate=1e-06 .* set task_reach to"),
        ({"reach_recompute": False}, "reach_recompute=False does nothing with task_reach=.1."),
        ({"log_drift": True, "fsdp": True}, "log_drift=True does not work under FSDP2"),
        ({"local_step": True, "train_early_blocks": False}, "local_step=True .* train_early_blocks=False.*to True"),
        ({"local_step": True, "enable_jit_checkpoint": True}, "local_step=True .* enable_jit_checkpoint=True"),
        ({"local_step": True, "fp16": True}, "local_step=True .* fp16.*use bf16"),
    ],
)
def test_options_are_checked(kind, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        KINDS[kind].config(str(tmp_path), **settings)


@every_kind
def test_local_step_in_the_precision_of_the_environment(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="local_step=True .* fp16"):
        KINDS[kind].config(str(tmp_path), bf16=False, local_step=True)


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_the_readout_does_not_fit(kind, tmp_path):
    with pytest.raises(ValueError, match=f"local_objective='readout' does not fit {kind.upper()}.*'reconstruction'"):
        KINDS[kind].config(str(tmp_path), local_objective="readout")


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
def test_a_reference_that_follows_the_model_under_an_engine(kind, tmp_path, monkeypatch):
    args = KINDS[kind].config(str(tmp_path), sync_ref_model=True, local_backward="joint")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="sync_ref_model=True does not work under FSDP"):
        KINDS[kind].trainer(model=make_model(), args=args, train_dataset=KINDS[kind].make_data())


@every_kind
def test_eager_under_deepspeed(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="local_backward='eager' .* DeepSpeed"):
        KINDS[kind].config(str(tmp_path), local_backward="eager")


@pytest.mark.parametrize(
    ("trainer", "config", "message"),
    [
        (LoPTTrainer, MLAANConfig, "args is MLAANConfig, whose 'window' .* pass LoPTConfig, or use the trainer that"),
        (MLAANTrainer, LoPTConfig, "args is LoPTConfig, whose 'train_early_blocks' .* pass MLAANConfig"),
        (LoPTDPOTrainer, SFTConfig, "args is SFTConfig, whose .* pass LoPTDPOConfig"),
    ],
)
def test_arguments_of_another_method_or_task(tmp_path, trainer, config, message):
    """What the trainer's own arguments do not know would be lost."""
    with pytest.raises(ValueError, match=message):
        trainer(make_model(), args=config(str(tmp_path), use_cpu=True, bf16=False), train_dataset=make_pairs())


@every_kind
def test_more_blocks_than_layers(kind, tmp_path):
    with pytest.raises(ValueError, match="num_blocks=5 does not fit a model with 4 layers"):
        make_trainer(tmp_path, num_blocks=5, kind=kind)


@every_kind
def test_split_beyond_the_layers(kind, tmp_path):
    with pytest.raises(ValueError, match=r"split_at=\[4\] .* 1 to 3"):
        make_trainer(tmp_path, split_at=[4], kind=kind)


SMALL = {
    "vocab_size": 90,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@every_kind
def test_encoder_decoder(kind, tmp_path):
    model = AutoModelForSeq2SeqLM.from_config(T5Config(vocab_size=90, d_model=32, num_layers=2, d_ff=32, num_heads=2))
    model.save_pretrained(tmp_path / "t5")
    for given in (model, str(tmp_path / "t5")):
        with pytest.raises(ValueError, match="is an encoder-decoder; local learning needs a decoder-only"):
            make_trainer(tmp_path, given, kind=kind)


@every_kind
def test_encoder(kind, tmp_path):
    with pytest.raises(ValueError, match="BertForMaskedLM has no language-modelling head"):
        make_trainer(tmp_path, AutoModelForMaskedLM.from_config(BertConfig(**SMALL)), kind=kind)


@every_kind
def test_quantised_model_without_an_adapter(kind, tmp_path):
    model = make_model()
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantised.*peft_config"):
        make_trainer(tmp_path, model, kind=kind)


@every_kind
def test_quantisation_asked_for_without_an_adapter(kind, tmp_path):
    make_model().save_pretrained(tmp_path / "base")
    kwargs = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
    with pytest.raises(ValueError, match="is quantised.*peft_config"):
        make_trainer(tmp_path, str(tmp_path / "base"), trainer_kwargs=kwargs, kind=kind)


@every_kind
def test_early_block_without_trainable_parameters(kind, tmp_path):
    model = make_model()
    make_trainer(tmp_path, model, train_early_blocks=False, kind=kind)
    with pytest.raises(ValueError, match=r"no parameter of block 0 \(layers 0 to 1\) is trainable"):
        make_trainer(tmp_path, model, kind=kind)


@every_kind
def test_early_learning_rate_with_an_optimizer_of_the_users_own(kind, tmp_path):
    model = make_model()
    kwargs = {"optimizers": (torch.optim.SGD(model.parameters(), lr=0.1), None)}
    with pytest.raises(ValueError, match="early_learning_rate=0.1 has no effect on an optimizer of your own"):
        make_trainer(tmp_path, model, early_learning_rate=0.1, trainer_kwargs=kwargs, kind=kind)


@every_kind
def test_prefix_tuning(kind, tmp_path):
    kwargs = {"peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)}
    with pytest.raises(ValueError, match="PrefixTuningConfig cannot be trained locally.*LoRA"):
        make_trainer(tmp_path, trainer_kwargs=kwargs, kind=kind)


@every_kind
@pytest.mark.parametrize("mode", ["eager", "joint"])
def test_weights_shared_across_blocks(kind, tmp_path, mode):
    model = make_model()
    model.model.layers[3].mlp = model.model.layers[0].mlp
    with pytest.raises(RuntimeError, match="loss of block . reaches .* which belongs to another block"):
        make_trainer(tmp_path, model, kind=kind, local_backward=mode).train()


@every_kind
def test_empty_data_set(kind, tmp_path):
    with pytest.raises(ValueError, match="train_dataset has no rows"):
        make_trainer(tmp_path, trainer_kwargs={"train_dataset": KINDS[kind].make_data().select([])}, kind=kind)


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("sft", r"completion \+ prompt.*rename the columns, set dataset_text_field"),
        ("dpo", r"chosen \+ prompt \+ rejected;.*rename the columns"),
        ("grpo", r"\(prompt\); rename the columns"),
    ],
)
def test_missing_column(kind, layouts, tmp_path):
    rows = Dataset.from_dict({"question": ["a"], "reply": ["b"]})
    with pytest.raises(ValueError, match=rf"train_dataset has the columns \['question', 'reply'\] .*{layouts}"):
        make_trainer(tmp_path, kind=kind, trainer_kwargs={"train_dataset": rows})


@every_kind
@pytest.mark.parametrize("where", ["weights", "local"])
def test_nan_stops_training_and_keeps_the_last_good_checkpoint(kind, tmp_path, where):
    settings = {"kind": kind, "max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    trainer = make_trainer(tmp_path, save_total_limit=1, **settings)
    original = trainer.compute_loss

    def poisoned(model, inputs, *args, **kwargs):
        if trainer.state.global_step == 3:
            target = trainer.local_heads if where == "local" else trainer.model.model.layers[3]
            next(target.parameters()).data.fill_(float("nan"))
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = poisoned
    with pytest.raises(FloatingPointError, match="is nan at step 4.*learning_rate"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_a_gradient_that_turns_nan_does_not_reach_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    weight = trainer.model.model.norm.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(FloatingPointError, match="grad_norm is nan at step 1"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def write_config(tmp_path, **values):
    lines = {"output_dir": tmp_path / "out", "report_to": "none", "max_steps": 1, **values}
    path = tmp_path / "recipe.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return ["--config", str(path)]


REWARDED: dict[str, dict] = {"sft": {}, "dpo": {}, "grpo": {"reward_funcs": "[gsm8k_reward]"}}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_blcks": 2}, "'num_blcks' (did you mean 'num_blocks'?)"),
        ({"num_blocks": 1}, "num_blocks=1"),
    ],
)
def test_bad_yaml_is_one_line(command, tmp_path, capsys, values, message):
    with pytest.raises(SystemExit) as exit_info:
        COMMANDS[command].main(write_config(tmp_path, **REWARDED[command], **values))
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"dataset_name": "arithmetic"}, "model_name_or_path is missing"),
        ({"model_name_or_path": "m"}, "dataset_name is missing"),
        ({"model_name_or_path": "m", "dataset_name": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"resume_from_checkpoint": "true"}, "resume_from_checkpoint=True: there is no checkpoint"),
    ],
)
def test_bad_arguments_of_the_command_are_one_line(command, tmp_path, values, message):
    with pytest.raises(SystemExit, match=message):
        COMMANDS[command].main(write_config(tmp_path, **REWARDED[command], **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "reward_funcs is missing; name some of gsm8k_reward"),
        ({"reward_funcs": "[gsm8k]"}, "reward_funcs=gsm8k is unknown"),
        ({"reward_funcs": "[nowhere.reward]"}, "reward_funcs=nowhere.reward is unknown"),
        ({"reward_funcs": "[lopt_hf.rewards.nothing]"}, "reward_funcs=lopt_hf.rewards.nothing is unknown"),
        (
            {"reward_funcs": "[gsm8k_reward]", "dataset_train_split": "dev"},
            "split 'dev' is unknown; arithmetic has train",
        ),
    ],
)
def test_bad_arguments_of_grpo_are_one_line(tmp_path, values, message):
    given = {"model_name_or_path": "m", "dataset_name": "arithmetic", **values}
    with pytest.raises(SystemExit, match=message):
        grpo.main(write_config(tmp_path, **given))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            gsm8k_reward,
            r"gsm8k_reward: missing a required argument: 'answer'.*columns \(solution\).*rename the columns",
        ),
        (lambda completions: [0.0], r"<lambda>: got an unexpected keyword argument 'prompts'.*let it take \*\*kwargs"),
    ],
)
def test_a_reward_that_cannot_be_called(tmp_path, reward, message):
    rows = KINDS["grpo"].make_data().rename_column("answer", "solution")
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, kind="grpo", trainer_kwargs={"train_dataset": rows, "reward_funcs": [reward]})


def test_a_reward_that_needs_a_package(tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "is_math_verify_available", lambda: False)
    with pytest.raises(SystemExit, match=r"accuracy_reward needs math-verify: `pip install"):
        grpo.main(write_config(tmp_path, reward_funcs="[accuracy_reward]"))


def test_a_reward_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text("def short(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    assert grpo.find_reward("my_rewards.short")(["a", "b"]) == [0.0, 0.0]


@pytest.mark.parametrize("name", ["gsm8k_reward", "boxed_reward", "think_format_reward"])
def test_rewards_by_name(name):
    assert grpo.find_reward(name).__name__ == name


def test_a_reward_whose_module_misses_a_package(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("import a_package_that_is_nowhere\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="No module named 'a_package_that_is_nowhere'"):
        grpo.main(write_config(tmp_path, reward_funcs="[broken_rewards.reward]"))


@pytest.mark.parametrize("trainer_class", [LocalSFTTrainer, LocalDPOTrainer, LocalGRPOTrainer])
@pytest.mark.parametrize("args", [None, SFTConfig("out", use_cpu=True)], ids=["none", "TRL's"])
def test_arguments_of_no_method(trainer_class, args):
    with pytest.raises(
        ValueError, match=r"args=(None|SFTConfig) has no arguments of a method; pass a config that has"
    ):
        trainer_class(make_model(), args=args)
