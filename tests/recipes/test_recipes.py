"""Every recipe parses with the parser of its command, and holds the values that it claims to hold."""

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

from lopt_hf.compare.grid import load_grid
from lopt_hf.scripts import dpo, grpo, mlaan, peers, pipeline, repl, sft
from lopt_hf.scripts.parsing import chosen, chosen_method
from tests.machine import set_machine

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"
ACCELERATE_CONFIGS = sorted((RECIPES / "accelerate_configs").glob("*.yaml"))
EXPERIMENTS = ROOT / "experiments"
GRIDS = sorted(EXPERIMENTS.glob("*/retention/*.yaml"))
REPL_RECIPES = sorted(EXPERIMENTS.glob("*/repl/*.yaml"))
MODEL_RECIPES = sorted(set(RECIPES.rglob("*.yaml")) - set(ACCELERATE_CONFIGS))
PARSERS = {
    "sft": sft.make_parser,
    "dpo": dpo.make_parser,
    "grpo": grpo.make_parser,
    "pipeline": pipeline.make_parser,
    "repl": repl.make_parser,
    "mlaan": mlaan.make_parser,
    "peers": peers.make_parser,
}  # by the recipe's folder

# LoPT, arXiv 2605.04913 v3
PAPER_MODELS = {
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
}
PAPER_DATA = {
    "alpaca": {"name": "tatsu-lab/alpaca", "rows": 52_002, "used": 52_002, "max_length": 512, "num_train_epochs": 3},
    "metamath": {
        "name": "meta-math/MetaMathQA",
        "rows": 395_000,
        "used": 100_000,
        "max_length": 1024,
        "num_train_epochs": 1,
    },
    "tulu3": {
        "name": "allenai/tulu-3-sft-mixture",
        "rows": 939_343,
        "used": 100_000,
        "max_length": 2048,
        "num_train_epochs": 1,
    },
}
PAPER_VALUES = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "bf16": True,
    "reconstruction_weight": 10.0,
    "early_learning_rate": None,  # one rate for both blocks
}
PAPER_GRPO_DATA = {
    "gsm8k": {"dataset_name": "openai/gsm8k", "dataset_config": "main", "reward_funcs": ["gsm8k_reward"]},
    "numinamath": {
        "dataset_name": "AI-MO/NuminaMath-CoT",
        "dataset_config": None,
        "reward_funcs": ["boxed_reward"],
    },
}
PAPER_GRPO_VALUES = {
    "method": "lopt",
    "num_blocks": 2,
    "reconstruction_weight": 10.0,
    "early_learning_rate": None,
    "learning_rate": 5e-6,
    "num_generations": 4,
    "temperature": 0.7,
    "top_p": 0.95,
    "epsilon": 0.2,
    "beta": 0.0,
    "loss_type": "grpo",
}
SMOLLM2_RECIPES = {
    "e2e": {"method": "e2e"},
    "lopt_k2": {"method": "lopt", "num_blocks": 2, "train_early_blocks": True},
    "lopt_k4": {"method": "lopt", "num_blocks": 4, "train_early_blocks": True},
    "reach_k2": {"num_blocks": 2, "task_reach": [2, 1, 1, 1], "reach_unit": "run", "local_objective": "none"},
    "reach_k4": {"num_blocks": 4, "task_reach": [4, 2, 2, 2], "reach_unit": "run", "local_objective": "none"},
    "freeze": {"method": "lopt", "num_blocks": 2, "train_early_blocks": False},
    "lora": {"method": "e2e", "use_peft": True, "lora_r": 16, "learning_rate": 2e-4},
}
ENGINES = {
    "single": DistributedType.NO,
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


def name_of(path: Path) -> str:
    return str(path.relative_to(RECIPES if path.is_relative_to(RECIPES) else EXPERIMENTS).with_suffix(""))


def parse(path: Path, task: str = "sft") -> dict[str, Any]:
    """The values of all dataclasses that a recipe is parsed into. Nothing may warn of a deprecated name."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        command = ["--config", str(path)]
        kinds = (chosen_method(command), chosen("task", command, "sft"))
        parser = pipeline.make_parser(*kinds) if task == "pipeline" else PARSERS[task]()
        parsed = parser.parse_args_and_config(command)
    return {key: value for arguments in parsed for key, value in vars(arguments).items()}


def recipe(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text((RECIPES / "smollm2-135m/sft/lopt_k2.yaml").read_text() + text)
    return path


@pytest.mark.parametrize("path", MODEL_RECIPES, ids=name_of)
def test_recipe_is_parsed_in_full(path: Path) -> None:
    values = parse(path, path.parent.name)
    written = yaml.safe_load(path.read_text())
    assert written.keys() <= values.keys()
    objective = {"local_objective"} & written.keys()  # none where gradients are late
    own = {"pipeline": ("num_stages", "gradient", *objective), "mlaan": ("window", "leap")}
    own_keys = ("method",) if "method" in written else own[path.parent.name]
    for key in ("model_name_or_path", "dataset_name", "output_dir", *own_keys):
        assert values[key] == written[key]
    task = f"{path.parent.name}-" if path.parent.name in ("dpo", "grpo") else ""
    assert values["output_dir"] == f"out/{path.parts[-3]}-{task}{path.stem}"
    assert values["report_to"] == []
    for key in ("activation_checkpointing", "gradient_checkpointing"):  # the old name is what TRL reads
        assert values[key] == written["activation_checkpointing"]


@pytest.mark.parametrize("path", MODEL_RECIPES, ids=name_of)
def test_recipe_is_mentioned_in_the_readme_of_its_model(path: Path) -> None:
    readmes = [folder / "README.md" for folder in path.parents[:2]]
    assert any(path.stem in readme.read_text() for readme in readmes if readme.is_file())


@pytest.mark.parametrize("path", GRIDS, ids=name_of)
def test_every_run_of_a_grid_is_parsed_in_full(path: Path, tmp_path: Path) -> None:
    """Each run's arguments are those of its command, and its README names the file."""
    assert path.name in (path.parent / "README.md").read_text()
    runs = load_grid(path).runs()
    averaged = [run for run in runs if run.source is not None]
    assert not any(run.command_arguments for run in averaged)  # of what the other runs train
    for run in (run for run in runs if run not in averaged):
        config = tmp_path / f"{run.name}.yaml"
        arguments = run.command_arguments
        config.write_text(yaml.safe_dump({**arguments, "output_dir": "out"}))
        values = parse(config, run.command)
        assert arguments.keys() <= values.keys()
        for key in arguments.keys() - {"report_to", "lora_target_modules"}:  # the two that their classes rewrite
            assert values[key] == arguments[key]


@pytest.mark.parametrize("path", GRIDS, ids=name_of)
def test_a_grids_settings_for_a_hub_and_for_a_mirror_are_settings(path: Path, tmp_path: Path) -> None:
    """Both load; held-out rows are not those trained on, and each task measured in part is one of the tasks."""
    for grid in (load_grid(path), load_grid(path, data_dir=tmp_path)):
        assert (grid.train_dataset, grid.train_split) != (grid.heldout_dataset, grid.heldout_split)
        assert set(grid.samples) == set(grid.tasks) and len(grid.tasks) == (
            1 if path.stem in ("delayed", "long") else 3
        )
    assert (load_grid(path).train_dataset, load_grid(path).include_path) == ("openai/gsm8k", None)
    assert Path(grid.train_dataset).parent == tmp_path / "data" and grid.dataset_config is None
    assert grid.include_path == str(tmp_path / "lm_eval_tasks")


@pytest.mark.parametrize("path", sorted([*RECIPES.rglob("*.yaml"), *EXPERIMENTS.rglob("*.yaml")]), ids=name_of)
def test_no_recipe_reads_what_a_clone_does_not_have(path: Path) -> None:
    """Data are a hub id or generated; a path is there only in a grid's mirror, below the folder that a user names."""
    assert "../shared" not in "".join(line for line in path.open() if not line.startswith("#"))
    written = yaml.safe_load(path.read_text())
    for key in ("dataset_name", "train_dataset", "heldout_dataset", "calibration_text", "eval_text"):
        assert not str(written.get(key, "")).startswith((".", "/", "~"))


@pytest.mark.parametrize("path", REPL_RECIPES, ids=name_of)
def test_repl_recipe_is_parsed_in_full(path: Path) -> None:
    values = parse(path, "repl")
    written = yaml.safe_load(path.read_text())
    assert written.keys() <= values.keys()
    for key in written.keys() - {"report_to", "learning_rate"}:
        assert values[key] == written[key]
    assert values["output_dir"] == f"out/{path.parts[-3]}-{path.stem}"
    assert path.name in (path.parent / "README.md").read_text()
    # What is measured is never calibrated on or trained on.
    assert values["eval_text"] == "Salesforce/wikitext:wikitext-2-raw-v1:test"
    assert values["eval_text"] not in (values["calibration_text"], values["dataset_name"])


@pytest.mark.parametrize("data", PAPER_DATA)
@pytest.mark.parametrize("model", PAPER_MODELS)
def test_paper_recipe_has_the_papers_values(model: str, data: str) -> None:
    values = parse(RECIPES / model / "sft" / f"lopt_{data}.yaml")
    expected = PAPER_DATA[data]
    assert values["model_name_or_path"] == PAPER_MODELS[model]
    assert values["dataset_name"] == expected["name"]
    assert {key: values[key] for key in PAPER_VALUES} == PAPER_VALUES
    assert (values["method"], values["num_blocks"], values["per_device_train_batch_size"]) == ("lopt", 2, 4)
    for key in ("max_length", "num_train_epochs"):
        assert values[key] == expected[key]
    assert values["dataset_train_split"] == "train"
    assert (values["dataset_max_samples"] or expected["rows"]) == expected["used"]


@pytest.mark.parametrize("data", PAPER_GRPO_DATA)
@pytest.mark.parametrize("model", PAPER_MODELS)
def test_grpo_recipe_has_the_papers_values(model: str, data: str) -> None:
    values = parse(RECIPES / model / "grpo" / f"lopt_{data}.yaml", "grpo")
    expected = {**PAPER_GRPO_VALUES, **PAPER_GRPO_DATA[data], "model_name_or_path": PAPER_MODELS[model]}
    assert {key: values[key] for key in expected} == expected
    assert callable(grpo.find_reward(values["reward_funcs"][0]))
    completions_per_step = 8 * values["per_device_train_batch_size"] * values["gradient_accumulation_steps"]
    assert completions_per_step == 64 and values["steps_per_generation"] == values["gradient_accumulation_steps"]


@pytest.mark.parametrize("task", ["grpo", "dpo"])
def test_smollm2_recipes_of_other_losses_differ_in_the_method_only(task: str) -> None:
    folder = RECIPES / "smollm2-135m" / task
    lopt, e2e = (yaml.safe_load((folder / f"{name}.yaml").read_text()) for name in ("lopt_k2", "e2e"))
    of_the_method = {"method", "num_blocks", "reconstruction_weight", "early_learning_rate", "output_dir"}
    assert {key for key in lopt.keys() | e2e.keys() if lopt.get(key) != e2e.get(key)} == of_the_method
    assert lopt["early_learning_rate"] == pytest.approx(lopt["learning_rate"] / 10)
    reach = yaml.safe_load((folder / "reach_k2.yaml").read_text())
    of_the_method = {"method", "num_blocks", "task_reach", "reach_unit", "local_objective", "output_dir"}
    assert {key for key in reach.keys() | e2e.keys() if reach.get(key) != e2e.get(key)} == of_the_method
    assert {path.stem for path in folder.glob("*.yaml")} == {"lopt_k2", "reach_k2", "e2e"}


@pytest.mark.parametrize("name", SMOLLM2_RECIPES)
def test_smollm2_recipe_has_the_papers_values_but_for_its_method(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_machine(monkeypatch, has_bfloat16=True)  # the recipes leave the type to the machine
    values = parse(RECIPES / "smollm2-135m/sft" / f"{name}.yaml")
    expected = {**PAPER_VALUES, **SMOLLM2_RECIPES[name]}
    assert {key: values[key] for key in expected} == expected
    assert values["model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert values["dataset_name"] == sft.WORD_PROBLEMS


def test_smollm2_recipes_differ_in_nothing_else() -> None:
    methods = {key for expected in SMOLLM2_RECIPES.values() for key in expected}
    methods |= {"reconstruction_weight", "lora_alpha", "lora_target_modules", "output_dir"}
    recipes = [yaml.safe_load((RECIPES / f"smollm2-135m/sft/{name}.yaml").read_text()) for name in SMOLLM2_RECIPES]
    shared = [{key: value for key, value in each.items() if key not in methods} for each in recipes]
    assert all(each == shared[0] for each in shared)


def test_all_smollm2_recipes_are_tested() -> None:
    assert {path.stem for path in (RECIPES / "smollm2-135m/sft").glob("*.yaml")} == set(SMOLLM2_RECIPES)


def test_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    arguments = ["--config", str(recipe(tmp_path, "")), "--output_dir", str(tmp_path), "--clip_scope", "global"]
    _, args, _ = sft.make_parser().parse_args_and_config(arguments)
    assert (args.output_dir, args.clip_scope) == (str(tmp_path), "global")


def test_unknown_key_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_blokcs"):
        parse(recipe(tmp_path, "num_blokcs: 2\n"))


def test_unknown_key_ends_the_command_with_the_nearest_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sft.main(["--config", str(recipe(tmp_path, "num_blokcs: 2\n"))])
    assert "did you mean 'num_blocks'?" in capsys.readouterr().err


def test_recipe_cannot_run_code(tmp_path: Path) -> None:
    made = tmp_path / "made"
    with pytest.raises(ValueError, match="could not determine a constructor for the tag") as error:
        parse(recipe(tmp_path, f"run_name: !!python/object/apply:pathlib.Path.touch [{made}]\n"))
    assert isinstance(error.value.__cause__, yaml.constructor.ConstructorError)
    assert not made.exists()


@pytest.mark.parametrize("path", ACCELERATE_CONFIGS, ids=name_of)
def test_accelerate_config_is_what_its_name_says(path: Path) -> None:
    engine, _, num_processes = path.stem.partition("_")
    config = load_config_from_file(str(path))
    assert config.num_processes == int(num_processes or 1)
    assert config.distributed_type == ENGINES[engine]
    assert config.mixed_precision == "no"  # or the file would turn bf16 on against the recipe
    assert config.fsdp_config.get("fsdp_version") == (2 if engine == "fsdp2" else None)
    assert config.deepspeed_config.get("zero_stage") == {"zero2": 2, "zero3": 3}.get(engine)


def test_ddp_2_starts_two_processes_without_a_gpu(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from accelerate import PartialState\n"
        "state = PartialState(cpu=True)  # what Trainer passes on: LoPTConfig sets use_cpu\n"
        "assert (state.num_processes, state.backend, state.device.type) == (2, 'gloo', 'cpu'), state\n"
        "state.destroy_process_group()\n"
    )
    config = RECIPES / "accelerate_configs/ddp_2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--main_process_port", "0", str(script)]  # 0: any free port
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
