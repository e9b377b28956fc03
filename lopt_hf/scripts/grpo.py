"""Group relative policy optimisation with LoPT.

```bash
lopt-hf grpo --config smollm2-135m/grpo/reach_k2
lopt-hf grpo --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name openai/gsm8k --dataset_config main \
    --reward_funcs gsm8k_reward --output_dir out
lopt-hf grpo --accelerate_config ddp_2 --config ...
```
"""

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trl import GRPOConfig, GRPOTrainer, ModelConfig, TrlParser
from trl.import_utils import is_math_verify_available

from lopt_hf.common.settings import option
from lopt_hf.data.arithmetic import make_arithmetic
from lopt_hf.data.questions import to_questions
from lopt_hf.local.run_facts import NEXT_TOKEN_MISFITS
from lopt_hf.scripts.parsing import chosen_method, make_trl_parser, refuse_method
from lopt_hf.scripts.presets import preset_of
from lopt_hf.scripts.training import DataArguments, MethodArguments, load_rows, prepare, run_training
from lopt_hf.trainers.checks import check_questions, check_rewards
from lopt_hf.trainers.configs import LoPTGRPOConfig, convert_config
from lopt_hf.trainers.grpo import LoPTGRPOTrainer, TruncationWarning

__all__ = ["GRPOScriptArguments", "find_reward", "main", "make_parser"]

GENERATED = {"arithmetic": make_arithmetic}
REWARDS = {
    "gsm8k_reward": "lopt_hf.rewards.gsm8k_reward",
    "boxed_reward": "lopt_hf.rewards.boxed_reward",
    "accuracy_reward": "trl.rewards.accuracy_reward",
    "reasoning_accuracy_reward": "trl.rewards.reasoning_accuracy_reward",
    "think_format_reward": "trl.rewards.think_format_reward",
}
REFERENCES = {  # what these rewards compare with
    "gsm8k_reward": "answer",
    "boxed_reward": "solution",
    "accuracy_reward": "solution",
    "reasoning_accuracy_reward": "solution",
}
NEED_MATH_VERIFY = ("accuracy_reward", "reasoning_accuracy_reward")


@dataclass
class GRPOScriptArguments(MethodArguments, DataArguments):
    """Which questions to train on, what is rewarded, and by which method.

    Parameters:
        dataset_name: Hub id, local `.json`, `.jsonl` or `.parquet` file, or `arithmetic` for the generated questions
            that the package carries.
        reward_funcs: Names of rewards, of which the sum counts.
        system_prompt: A system message before each question that has none of its own, as the generated ones have.
    """

    dataset_name: str | None = option(
        None,
        "Hub id, local .json, .jsonl or .parquet file with a column prompt, question or problem and what "
        "the rewards need (answer, solution); or 'arithmetic' (generated, offline).",
    )
    reward_funcs: list[str] | None = option(
        None, f"Rewards, added up: {', '.join(REWARDS)}, or the dotted path of a function (my_lib.my_reward)."
    )
    system_prompt: str | None = option(
        None, "A system message before each question that has none of its own (the generated ones do)."
    )


def make_parser(method: str = "lopt", argv: Sequence[str] | None = ()) -> TrlParser:
    """Makes the parser of this command: script, training and model arguments, and `--config file.yaml`.

    Args:
        method: The method whose defaults it has.
        argv: What it is to parse; default: nothing.
    """
    parser = make_trl_parser("grpo", __doc__, GRPOScriptArguments, LoPTGRPOConfig, ModelConfig)
    parser.set_defaults(**preset_of(method, argv))
    return parser


def load_split(script_args: GRPOScriptArguments, split: str, seed: int) -> Any:
    """Loads one split of the data with a column `prompt`."""
    references = [REFERENCES[name] for name in script_args.reward_funcs or () if name in REFERENCES]
    return to_questions(load_rows(script_args, split, seed, GENERATED), script_args.system_prompt, references)


def find_reward(name: str) -> Callable[..., Any]:
    """The reward function of this name or dotted path.

    Raises:
        ValueError: If there is none.
        ImportError: If it needs a package that is not installed.
    """
    if name in NEED_MATH_VERIFY and not is_math_verify_available():
        raise ImportError(f'reward_funcs={name} needs math-verify: `pip install "lopt_hf[math]"`.')
    module, _, function = REWARDS.get(name, name).rpartition(".")
    sys.path.append(os.getcwd())  # as with `python -m`, so that a function of the user's own is found
    try:
        reward: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return reward
    except (ValueError, ModuleNotFoundError, AttributeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name and not module.startswith(error.name):
            raise  # something that the user's module imports
        raise ValueError(
            f"reward_funcs={name} is unknown; choose from {', '.join(REWARDS)}, or give the dotted path of a function."
        ) from error
    finally:
        sys.path.pop()


def make_trainer(script_args: GRPOScriptArguments, args: LoPTGRPOConfig, model_args: ModelConfig) -> GRPOTrainer:
    """Builds the trainer of `method` from parsed arguments."""
    if not script_args.reward_funcs:
        raise ValueError(f"reward_funcs is missing; name some of {', '.join(REWARDS)}, or a function of your own.")
    rewards: list[Any] = [find_reward(name) for name in script_args.reward_funcs]
    model, given = prepare(script_args, args, model_args, load_split)
    if script_args.method == "e2e":
        check_questions(given["train_dataset"], args)
        check_rewards(rewards, given["train_dataset"])
        said: list[Any] = [TruncationWarning(args.max_completion_length)]
        return GRPOTrainer(model, rewards, convert_config(args, GRPOConfig), callbacks=said, **given)
    return LoPTGRPOTrainer(model, rewards, args, **given)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, saves and, if asked to, pushes a model."""
    refuse_method("grpo", argv, {"mlaan": f"{NEXT_TOKEN_MISFITS['GRPO']}; use 'lopt' or 'e2e'"})
    run_training(make_parser(chosen_method(argv), argv), argv, make_trainer)


if __name__ == "__main__":
    main()
