"""The training commands on a tiny model: from the arguments to a stock checkpoint, by each method."""

import json
import re
import shutil

import pytest
import yaml
from transformers import AutoModelForCausalLM

from lopt_hf import cli
from lopt_hf.compare.curves import read_curve
from lopt_hf.scripts import dpo, grpo, sft
from tests.tiny import make_model, make_tokenizer

COMMANDS = {
    "sft": (sft, {"dataset_name": "word-problems", "max_length": 64}),
    "dpo": (dpo, {"dataset_name": "arithmetic"}),
    "grpo": (
        grpo,
        {
            "dataset_name": "arithmetic",
            "reward_funcs": ["gsm8k_reward", "tests.trainers.helpers.token_reward"],
            "num_generations": 2,
            "max_completion_length": 4,
        },
    ),
}


def arguments(tmp_path, command, **values):
    """A recipe as a file, for a run of two steps."""
    make_model().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    recipe = {
        "model_name_or_path": str(tmp_path / "base"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "activation_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **COMMANDS[command][1],
        **values,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return ["--config", str(path)]


def test_an_evaluation_at_the_start_has_its_data(tmp_path):
    cli.main(["sft", *arguments(tmp_path, "sft", eval_on_start=True, max_steps=1)])
    assert 0 in read_curve(str(tmp_path / "out"), "eval_loss")


@pytest.mark.parametrize("method", ["lopt", "e2e"])
def test_a_best_metric_that_is_not_measured_is_one_line(tmp_path, method, capsys):
    given = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "accuracy", "method": method}
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft", *arguments(tmp_path, "sft", **given)])
    assert ended.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    message = "metric_for_best_model='accuracy' is not measured; choose one of loss, "
    assert f"lopt-hf sft: {message}" in line and "mean_token_accuracy" in line and "runtime" not in line
    sft.main(arguments(tmp_path, "sft", **{**given, "metric_for_best_model": "mean_token_accuracy"}))


def test_a_column_of_text_that_the_arguments_name(tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"content": text}) + "\n" for text in ("Once.", "", "Twice.", "Again.")))
    values = {"dataset_name": str(data), "dataset_text_field": "content", "max_steps": 1}
    with pytest.raises(SystemExit, match="row 2: 'content' is empty.*Or set skip_empty_rows to leave out"):
        cli.main(["sft", *arguments(tmp_path, "sft", **values)])
    cli.main(["sft", *arguments(tmp_path, "sft", **values, skip_empty_rows=True)])
    assert list(read_curve(str(tmp_path / "out"), "loss")) == [1]


@pytest.mark.parametrize("method", ["lopt", "e2e"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_run(tmp_path, command, method, capsys):
    cli.main([command, *arguments(tmp_path, command, method=method)])
    assert "Arithmetic: float32 on " in capsys.readouterr().out
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    losses = read_curve(str(tmp_path / "out"), "loss")
    assert list(losses) == [1, 2]
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert any("local_loss/block_0" in row for row in log) == (method == "lopt")
    if command == "grpo":
        assert any("rewards/token_reward/mean" in row for row in log)


@pytest.mark.parametrize("command", ["sft", "mlaan"])
def test_mlaan_is_a_method_of_sft(tmp_path, command):
    method = {"method": "mlaan"} if command == "sft" else {}
    given = arguments(tmp_path, "sft", **method, num_blocks=2, window=1, calibration_tokens=64)
    cli.main([command, *given])
    log = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert any("local_loss/block_0/cascaded" in row for row in log)
    assert f"`lopt-hf {command} --config recipe.yaml`" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("command", "method", "reason"),
    [
        ("dpo", "mlaan", "early blocks would learn the rejected answers as they learn the chosen ones"),
        ("grpo", "mlaan", "early blocks would learn to repeat every completion, whatever its reward"),
        ("pipeline", "e2e", "end-to-end training sends gradients back from stage to stage"),
    ],
)
def test_a_method_that_cannot_work_is_refused_with_the_reason(capsys, command, method, reason):
    with pytest.raises(SystemExit) as refused:
        cli.main([command, "--method", method, "--window", "2"])
    error = capsys.readouterr().err
    assert refused.value.code == 2 and error.count("\n") == 1
    assert f"lopt-hf {command}: error: method={method!r}" in error and reason in error


@pytest.mark.parametrize("command", ["dpo", "grpo"])
def test_a_run_goes_on(tmp_path, command):
    saving = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    module = COMMANDS[command][0]
    module.main(arguments(tmp_path, command, **saving, max_steps=1))
    module.main(arguments(tmp_path, command, **saving, max_steps=2))
    assert list(read_curve(str(tmp_path / "out"), "loss")) == [1, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_blocks": 3}, "resume_from_checkpoint=.* was trained with num_blocks=2"),
        (
            {"method": "e2e", "dataset_name": "{}/q.jsonl"},
            r"train_dataset has the columns \['question'\]",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, values, message):
    saving = {"save_strategy": "steps", "save_steps": 1, "resume_from_checkpoint": "auto"}
    dpo.main(arguments(tmp_path, "dpo", **saving, max_steps=1))
    (tmp_path / "q.jsonl").write_text('{"question": "1 + 1?"}\n')
    values = {name: value.format(tmp_path) if isinstance(value, str) else value for name, value in values.items()}
    with pytest.raises(SystemExit, match=f"lopt-hf dpo: {message}"):
        dpo.main(arguments(tmp_path, "dpo", **{**saving, **values}))


@pytest.mark.parametrize("command", COMMANDS)
def test_another_runs_folder_is_left_alone(tmp_path, command):
    (tmp_path / "out/checkpoint-1").mkdir(parents=True)
    (tmp_path / "out/checkpoint-1/trainer_state.json").write_text("{}")
    with pytest.raises(SystemExit, match=f"lopt-hf {command}: output_dir=.* holds another run's checkpoints"):
        COMMANDS[command][0].main(arguments(tmp_path, command))


def test_a_model_that_is_there_is_not_overwritten(tmp_path, capsys):
    sft.main(arguments(tmp_path, "sft", max_steps=1))
    weights = (tmp_path / "out/model.safetensors").read_bytes()
    for values, message in (
        ({}, "holds a model .config.json. that would be overwritten; choose another output_dir"),
        ({"model_name_or_path": str(tmp_path / "out")}, "is the model that the run starts from"),
    ):
        with pytest.raises(SystemExit, match=f"lopt-hf sft: output_dir=.* {message}"):
            sft.main(arguments(tmp_path, "sft", max_steps=1, **values))
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights
    sft.main(arguments(tmp_path, "sft", max_steps=1, resume_from_checkpoint="auto"))  # of a job that begins again


def test_options_of_an_adapter_that_is_not_asked_for_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="lora_r=8 does nothing without use_peft; add --use_peft"):
        sft.main(arguments(tmp_path, "sft", lora_r=8))


def test_a_run_without_checkpoints_has_a_model_card(tmp_path):
    (tmp_path / "out").mkdir()
    for written in ("the user's own", None):
        card = tmp_path / "out/README.md"
        if written is not None:
            card.write_text(written)
        sft.main(arguments(tmp_path, "sft", max_steps=1))
        assert card.read_text() == written if written else "2605.04913" in card.read_text()
        shutil.rmtree(tmp_path / "out")


def test_an_interrupted_run_says_what_is_kept(tmp_path, capsys, monkeypatch):
    def interrupt(trainer, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sft.LoPTTrainer, "save_state", interrupt)
    for saving, message in (
        ({}, "interrupted after step 1; no checkpoint has been saved."),
        ({"save_strategy": "steps", "save_steps": 1}, "--resume_from_checkpoint true goes on from .*checkpoint-1"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["sft", *arguments(tmp_path, "sft", max_steps=1, **saving)])
        assert ended.value.code == 130 and re.search(message, capsys.readouterr().err)
        shutil.rmtree(tmp_path / "out")
    monkeypatch.setattr(sft, "main", interrupt)
    with pytest.raises(SystemExit) as ended:
        cli.main(["sft"])
    assert ended.value.code == 130 and capsys.readouterr().err == "\nlopt-hf sft: interrupted.\n"


def test_the_process_group_is_gone_at_the_end(tmp_path, monkeypatch):
    ended = []
    monkeypatch.setattr(sft.LoPTTrainer, "end", lambda trainer: ended.append(trainer.state.global_step))
    sft.main(arguments(tmp_path, "sft"))
    assert ended == [2]


@pytest.mark.parametrize("method", ["lopt", "e2e"])
@pytest.mark.parametrize("masks", [True, False])
def test_grpo_says_that_it_learns_nothing_of_completions_that_are_all_cut_off(tmp_path, caplog, method, masks):
    cli.main(["grpo", *arguments(tmp_path, "grpo", method=method, mask_truncated_completions=masks)])
    assert read_curve(str(tmp_path / "out"), "completions/clipped_ratio")[1] == 1.0
    said = [message for message in caplog.messages if message.startswith("max_completion_length=4 cut off every")]
    assert len(said) == masks


def test_the_card_tells_how_many_rows_there_were(tmp_path, caplog):
    """Not how many were asked for."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "Hi", "answer": "Hello"}) + "\n" + '{"question": "a", "answer": "b"}\n')
    sft.main(arguments(tmp_path, "sft", dataset_name=str(path), dataset_max_samples=1000))
    assert "dataset_max_samples=1000, but there are 2 rows: all are taken." in caplog.messages
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`rows.jsonl`; 2 rows" in card


@pytest.mark.parametrize("option", [{"dataset_config": "main"}, {"dataset_streaming": True}])
def test_options_that_generated_data_have_no_use_for(tmp_path, option, capsys):
    with pytest.raises(SystemExit) as ended:
        sft.main(arguments(tmp_path, "sft", **option))
    assert ended.value.code == 2
    (name, value), *_ = option.items()
    message = f"{name}={value!r} does nothing for dataset_name='word-problems', which is generated; leave it out."
    assert message in capsys.readouterr().err
