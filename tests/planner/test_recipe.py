"""A written recipe is one that its command takes, with the values that were planned."""

import pytest

from lopt_hf.common.compared_methods import PEERS, mlaan_window
from lopt_hf.planner.plan import Plan, PlanRow, PlanSettings
from lopt_hf.planner.recipe import make_recipe
from lopt_hf.planner.strategies import STRATEGIES, make_strategies
from lopt_hf.planner.units import GIB
from lopt_hf.scripts import mlaan, peers, pipeline, repl, sft
from tests.planner.test_plan import SLOW
from tests.planner.test_simulation import tiny_config

PARSERS = {command.__name__.rpartition(".")[2]: command.make_parser for command in (mlaan, peers, pipeline, repl, sft)}
SETTINGS = PlanSettings(
    model="Qwen/Qwen2.5-7B-Instruct",
    device_memory=80 * GIB,
    batch_size=3,
    seq_length=768,
    accumulation_steps=2,
    optim="adamw_8bit",
    lora_r=8,
    num_gpus=4,
    tied_embeddings="freeze",
)
ROWS = make_strategies(STRATEGIES, (2, 4), tiny_config(num_hidden_layers=8), num_gpus=4, lora_rank=8)[0]
IN_ONE_PROCESS = tuple(method for method in PEERS if method != "freeze_last")
ROWS += make_strategies(IN_ONE_PROCESS, (2, 4), tiny_config(num_hidden_layers=8))[0]
EXPECTED = {
    "e2e": {"method": "e2e", "use_peft": False},
    "lopt": {"method": "lopt", "local_backward": "eager", "tied_embeddings": "freeze"},
    "reach": {"method": "lopt", "local_objective": "none", "local_step": False, "tied_embeddings": "freeze"},
    "reach_local_step": {"method": "lopt", "local_objective": "none", "local_step": True},
    "lopt_local_step": {"method": "lopt", "local_step": True, "tied_embeddings": "freeze"},
    "mlaan": {"tied_embeddings": "freeze", "early_learning_rate": None},
    "joint": {"method": "lopt", "local_backward": "joint"},
    "freeze": {"method": "lopt", "num_blocks": 2, "train_early_blocks": False},
    "lora": {"method": "e2e", "use_peft": True, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": "all-linear"},
    "e2e_segments": {"method": "e2e_segments", "max_grad_norm": 1.0},
    "e2e_step_in_backward": {"method": "e2e_step_in_backward", "max_grad_norm": 0.0},
    "freeze_last": {"method": "freeze_last", "num_blocks": 2},
    "lisa": {"method": "lisa", "lisa_layers": 2, "lisa_period": 20},
    "badam": {"method": "badam", "badam_period": 100},
    "repl": {"operator": "linear", "placement": "every", "every": 4},
    "ppll": {"num_stages": 4, "num_blocks": 4, "tied_embeddings": "freeze"},
}


def parse(strategy, tmp_path):
    row = PlanRow(strategy, SLOW.cost, True, 1e9, None, 1.0)
    recipe = make_recipe(Plan(SETTINGS, (row,)), row, "my-data.jsonl")
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.text)
    parsed = PARSERS[recipe.command]().parse_args_and_config(["--config", str(path)])
    return recipe, {key: value for arguments in parsed for key, value in vars(arguments).items()}


@pytest.mark.parametrize("strategy", ROWS, ids=lambda strategy: strategy.name)
def test_round_trip(strategy, tmp_path):
    recipe, values = parse(strategy, tmp_path)
    expected = EXPECTED[strategy.method] | {
        "model_name_or_path": "Qwen/Qwen2.5-7B-Instruct",
        "dataset_name": "my-data.jsonl",
        "dtype": "bfloat16",
        "attn_implementation": "sdpa",
        "max_length": 768,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_8bit",
        "bf16": True,
        "gradient_checkpointing": strategy.checkpointing,
        "report_to": [],
    }
    if strategy.method in ("reach", "reach_local_step"):
        expected |= {
            "num_blocks": strategy.num_blocks,
            "task_reach": [strategy.num_blocks, 1, 1, 1],
            "reach_unit": "run",
        }
    if strategy.method == "mlaan":
        expected["window"] = mlaan_window(strategy.num_blocks)
    if strategy.method in ("lopt", "lopt_local_step", "mlaan", "joint", "ppll", "e2e_segments"):
        expected["num_blocks"] = strategy.num_blocks
    assert {key: values[key] for key in expected} == expected
    assert "bitsandbytes" in recipe.text


@pytest.mark.parametrize("method", STRATEGIES)
def test_comment_has_the_command(method, tmp_path):
    strategy = next(row for row in ROWS if row.method == method)
    recipe, _ = parse(strategy, tmp_path)
    launch = recipe.text.splitlines()[2]
    if recipe.command in ("sft", "mlaan", "peers"):
        assert "accelerate launch --multi_gpu --num_processes 4" in launch
        assert f"-m lopt_hf.scripts.{recipe.command}" in launch
    else:
        assert launch == f"#   lopt-hf {recipe.command} --config THIS_FILE"
