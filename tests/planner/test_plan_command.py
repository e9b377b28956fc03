"""`lopt-hf plan` as a user runs it, on the configuration of a tiny model."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import GPT2Config

from lopt_hf import cli
from lopt_hf.bench.training import num_layers
from lopt_hf.scripts import sft
from lopt_hf.scripts.plan import main
from lopt_hf.trainers.checks import check_model
from lopt_hf.trainers.configs import LoPTConfig
from tests.planner.test_simulation import tiny_config

ARGUMENTS = ["--device-memory", "1GiB", "--batch-size", "2", "--seq-length", "16", "--num-blocks", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that has a config.json and nothing else."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_config(architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    return line


def test_all_files(folder, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("recipe.yaml", "plan.json", "plan.png")}
    outputs = ["--write", files["recipe.yaml"], "--output", files["plan.json"], "--plot", files["plan.png"]]
    cli.main(["plan", "--model", folder, *ARGUMENTS, "--strategies", "e2e,lopt", *map(str, outputs)])
    printed = capsys.readouterr().out
    assert "| **end-to-end** (cheapest) |" in printed
    assert printed.endswith(f"lopt-hf sft --config {files['recipe.yaml']}\n")
    plan = json.loads(files["plan.json"].read_text())
    assert plan["cheapest"] == "end-to-end"
    assert [row["strategy"]["method"] for row in plan["rows"]] == ["e2e", "e2e", "lopt", "lopt"]
    assert all(sum(row["cost"]["peak"].values()) == row["cost"]["peak_bytes"] for row in plan["rows"])
    assert files["plan.png"].read_bytes().startswith(b"\x89PNG")
    _, args, model_args = sft.make_parser().parse_args_and_config(["--config", str(files["recipe.yaml"])])
    assert (model_args.model_name_or_path, args.max_length) == (folder, 16)


@pytest.mark.parametrize("option", ["--write", "--output", "--plot", "--calibrate"])
def test_nothing_is_overwritten(option, folder, tmp_path, capsys):
    path = tmp_path / "mine"
    path.write_text("mine")
    line = fails(capsys, "--model", folder, *ARGUMENTS, option, str(path))
    assert f"{option[2:]}='{path}' exists and is not overwritten" in line
    assert path.read_text() == "mine"


def test_two_files_are_not_one(folder, tmp_path, capsys):
    path = str(tmp_path / "mine")
    line = fails(capsys, "--model", folder, *ARGUMENTS, "--write", path, "--output", path)
    assert f"output and write are both '{path}'; give each a file of its own" in line


def test_calibrated_then_read_again(folder, tmp_path, capsys):
    path = tmp_path / "speed.json"
    arguments = ["--model", folder, *ARGUMENTS, "--strategies", "e2e"]
    main([*arguments, "--calibrate", str(path)])
    first = capsys.readouterr().out
    main([*arguments, "--calibration", str(path)])
    assert capsys.readouterr().out == first
    assert "communication not counted" in first


def test_a_bar_tells_how_far_the_simulation_is_and_sizes_of_a_small_model_are_not_zero(folder, capsys):
    main(["--model", folder, *ARGUMENTS, "--strategies", "e2e,lora"])
    printed = capsys.readouterr()
    assert "simulating LoRA" in printed.err and "4/4" in printed.err
    assert "0.00 | 0.00 | 0.00" not in printed.out and "MiB on the fullest device" in printed.out


@pytest.mark.parametrize("method", ["gptq", "fp8", "bitsandbytes"])
def test_a_quantised_checkpoint_is_planned_as_sft_takes_it(method, folder, tmp_path, capsys):
    """With adapters only, in the words in which `sft` refuses the rest."""
    config = json.loads((Path(folder) / "config.json").read_text())
    quantised = tmp_path / "quantised"
    quantised.mkdir()
    quantization = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (quantised / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    main(["--model", str(quantised), *ARGUMENTS, "--strategies", "e2e,lopt,lora"])
    printed = capsys.readouterr().out
    names = [line.split("|")[1].strip(" *") for line in printed.splitlines() if line.startswith("| ")][2:]
    assert names and all(name.startswith("LoRA") for name in names)
    reason = "is quantised, and quantised weights cannot be trained; pass a peft_config"
    assert reason in printed and "end-to-end, end-to-end + checkpointing, LoPT K=2" in printed
    assert "its weights are counted as if they were not" in printed
    assert reason in fails(capsys, "--model", str(quantised), *ARGUMENTS, "--strategies", "e2e")
    with pytest.raises(ValueError, match=reason):
        check_model(str(quantised), LoPTConfig(str(tmp_path / "out")), None, None)


def test_a_device_too_small_for_anything(folder, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    arguments = ["--model", folder, *ARGUMENTS, "--strategies", "e2e", "--device-memory", "0.01MiB"]
    main(arguments)
    assert "Nothing fits in 10.24 KiB with 10% kept free. The least is 'end-to-end" in capsys.readouterr().out
    assert "no strategy fits, so there is no recipe to write" in fails(capsys, *arguments, "--write", str(recipe))
    assert not recipe.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--device-memory", "80"],
            "device_memory='80' is no size of memory; write",
        ),
        (["--model", "no/such-model"], "model='no/such-model' is no folder with a config.json"),
        (["--optim", "adamw9"], "optim='adamw9' is unknown"),
        (["--num-blocks", "2,x"], "'2,x' is not a comma-separated list of integers"),
        (["--seq-length", "4096"], "seq_length=4096: the model takes 128 tokens"),
        (["--write", "no/such/folder/recipe.yaml"], "its folder does not exist"),
        (["--calibration", "none.json"], "calibration='none.json' is no measurement"),
    ],
)
def test_bad_input_ends_in_one_line(arguments, message, folder, capsys):
    assert message in fails(capsys, "--model", folder, *ARGUMENTS, *arguments)


def test_recipe_is_yaml_that_runs_no_code(folder, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    dataset = "x: !!python/name:os.system"
    arguments = ["--strategies", "lopt", "--dataset", dataset, "--write", str(recipe)]
    main(["--model", folder, *ARGUMENTS, *arguments])
    assert yaml.safe_load(recipe.read_text())["dataset_name"] == dataset


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "lopt-hf plan --model Qwen/Qwen2.5-7B-Instruct --device-memory 80GiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value"), [("--batch-size", 99999999999999999999), ("--lora-r", 10**22), ("--num-gpus", 2**21)]
)
def test_numbers_beyond_any_training_are_one_line(option, value, folder, capsys):
    line = fails(capsys, "--model", folder, *ARGUMENTS, option, str(value))
    assert f"{option[2:].replace('-', '_')}={value} is too large; set it to 1048576 or less" in line


@pytest.mark.parametrize(("option", "value"), [("--dataset", "rows.jsonl"), ("--reach-unit", "step")])
def test_what_is_for_a_recipe_that_is_not_written(option, value, folder, capsys):
    line = fails(capsys, "--model", folder, *ARGUMENTS, option, value)
    name = option[2:].replace("-", "_")
    assert f"{name}='{value}' is for the recipe that --write asks for; add it, or leave it out" in line


def test_the_length_that_gpt2_takes_is_known(tmp_path, capsys):
    """It has a name of its own there."""
    GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=64, vocab_size=32).save_pretrained(tmp_path)
    line = fails(capsys, "--model", str(tmp_path), *ARGUMENTS, "--seq-length", "65")
    assert "seq_length=65: the model takes 64 tokens; use at most 64." in line
    with pytest.raises(ValueError, match="seq_length=65: the model takes 64 tokens"):
        num_layers("gpt2", str(tmp_path), 65)
