"""`--method reach` and `--method freeze`: settings of LoPT that whatever is given wins over."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt_hf import cli
from lopt_hf.scripts import dpo, grpo, sft
from lopt_hf.scripts.parsing import chosen_method
from tests.scripts.test_training import COMMANDS, arguments

SCRIPTS = {"sft": sft, "dpo": dpo, "grpo": grpo}


def parse(command, argv):
    parser = SCRIPTS[command].make_parser(chosen_method(argv), argv=argv)
    return parser.parse_args_and_config([*argv, "--output_dir", "out"])[1]


def settings(args):
    names = ("num_blocks", "task_reach", "reach_unit", "local_objective", "activation_checkpointing")
    return tuple(getattr(args, name) for name in names)


@pytest.mark.parametrize("command", SCRIPTS)
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["reach"], (2, [2, 1, 1, 1], "run", "none", False)),
        (["reach", "--num_blocks", "4"], (4, [4, 2, 2, 2], "run", "none", False)),
        (["reach", "--num-blocks=3"], (3, [3, 1, 1, 1], "run", "none", False)),
        (["reach", "--task_reach", "[1,2]", "--reach_unit", "step"], (2, [1, 2], "step", "none", False)),
        (["reach", "--task_reach", "2"], (2, [2], "step", "none", False)),
        (["reach", "--local_objective", "reconstruction"], (2, [2, 1, 1, 1], "run", "reconstruction", False)),
        (["freeze"], (2, [1], "step", "none", False)),
        (["freeze", "--num_blocks", "3", "--activation_checkpointing", "true"], (3, [1], "step", "none", True)),
        (["reach", "--gradient_checkpointing", "true"], (2, [2, 1, 1, 1], "run", "none", True)),  # the old name
        (["reach", "--gradient-checkpointing=false"], (2, [2, 1, 1, 1], "run", "none", False)),
        (["freeze", "--gradient_checkpointing"], (2, [1], "step", "none", True)),
        (["lopt"], (2, [1], "step", "reconstruction", True)),
    ],
)
def test_what_a_method_sets(command, argv, expected):
    assert settings(parse(command, ["--method", *argv])) == expected


def test_a_recipe_wins_over_the_method(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: reach\nnum_blocks: 4\nreach_unit: step\nactivation_checkpointing: true\n")
    assert settings(parse("sft", ["--config", str(recipe)])) == (4, [4, 2, 2, 2], "step", "none", True)
    assert settings(parse("sft", ["--config", str(recipe), "--num_blocks", "2"]))[:2] == (2, [2, 1, 1, 1])


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_the_command_line_wins_over_a_recipe_by_the_old_name_of_an_option_too(name, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"method: reach\n{name}: false\n")
    assert settings(parse("sft", ["--config", str(recipe), "--gradient_checkpointing", "true"]))[-1] is True
    recipe.write_text(f"method: reach\n{name}: true\n")
    assert settings(parse("sft", ["--config", str(recipe)]))[-1] is True


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "freeze", "task_reach": [1, 2]},
            r"task_reach=\[1, 2\] trains early blocks, which method='freeze'",
        ),
        (
            {"method": "freeze", "local_objective": "reconstruction"},
            "local_objective='reconstruction' trains early blocks, which",
        ),
        (
            {"method": "reach", "task_reach": 1, "reach_unit": "step"},
            r"task_reach=\[1\] is freezing the early blocks; with method='reach'",
        ),
    ],
)
def test_what_is_no_such_method(tmp_path, command, values, message):
    with pytest.raises(SystemExit, match=message):
        cli.main([command, *arguments(tmp_path, command, **values)])


def test_freezing_leaves_the_first_half_as_it_is(tmp_path):
    given = arguments(tmp_path, "sft", method="freeze", learning_rate=1e-2)
    cli.main(["sft", *given])
    before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("base", "out"))
    changed = {
        name.split(".")[2] for name in before if not torch.equal(before[name], after[name]) and "layers" in name
    }
    assert changed == {"2", "3"}
