"""A row of a plan as a recipe that its command takes."""

from dataclasses import dataclass
from typing import Any

import yaml

from lopt_hf.common.compared_methods import PEERS, REPL_EVERY, method_arguments
from lopt_hf.planner.plan import Plan, PlanRow
from lopt_hf.planner.setups import LORA_ALPHA_PER_RANK
from lopt_hf.planner.units import size_text

__all__ = ["Recipe", "make_recipe"]

LEARNING_RATE = 2e-5  # LoPT paper
LORA_LEARNING_RATE = 2e-4  # the tenfold, as in TRL's SFT example with LoRA
EARLY_LEARNING_RATE = 2e-6  # ours: a tenth for early blocks, measured in recipes/smollm2-135m


@dataclass(frozen=True)
class Recipe:
    """A YAML file for a command.

    Attributes:
        command: `"sft"`, `"mlaan"`, `"peers"`, `"pipeline"` or `"repl"`.
        text: Its content.
    """

    command: str
    text: str


def make_recipe(plan: Plan, row: PlanRow, dataset: str) -> Recipe:
    """Makes the recipe of one row.

    Args:
        plan: The plan that the row is of.
        row: What to train with.
        dataset: Value of `dataset_name`.
    """
    commands = {"ppll": "pipeline", "repl": "repl", "mlaan": "mlaan", **dict.fromkeys(PEERS, "peers")}
    command = commands.get(row.strategy.method, "sft")
    values = yaml.safe_dump(_method(plan, row) | _common(plan, row, dataset), sort_keys=False)
    return Recipe(command, _comment(plan, row, command) + values)


def _comment(plan: Plan, row: PlanRow, command: str) -> str:
    settings = plan.settings
    launch = f"lopt-hf {command} --config THIS_FILE"
    if settings.num_gpus > 1 and command in ("sft", "mlaan", "peers"):
        launch = (
            f"accelerate launch --multi_gpu --num_processes {settings.num_gpus} --mixed_precision no "
            f"-m lopt_hf.scripts.{command} --config THIS_FILE"
        )
    lines = [
        f"{row.strategy.name}: {settings.model}, written by `lopt-hf plan`.",
        "",
        f"  {launch}",
        "",
        f"Predicted peak: {size_text(row.cost.peak_bytes)} of {size_text(settings.device_bytes)}, for "
        f"{settings.batch_size} x {settings.seq_length} tokens without padding.",
        "Learning rates and schedule are LoPT's (arXiv 2605.04913) or those of recipes/smollm2-135m: tune them.",
    ]
    if settings.optim in ("adamw_8bit", "adamw_bnb_8bit"):
        lines.append("The optimizer needs `pip install bitsandbytes`.")
    return "".join(f"# {line}".rstrip() + "\n" for line in lines) + "\n"


def _method(plan: Plan, row: PlanRow) -> dict[str, Any]:
    strategy, settings = row.strategy, plan.settings
    method, early = strategy.method, {"early_learning_rate": EARLY_LEARNING_RATE}
    if method == "repl":
        return {"operator": "linear", "placement": "every", "every": REPL_EVERY}
    if method == "lora":
        adapter = {"lora_r": settings.lora_r, "lora_alpha": LORA_ALPHA_PER_RANK * settings.lora_r}
        return {"method": "e2e", "use_peft": True, **adapter, "lora_target_modules": ["all-linear"]}
    if method in ("e2e_segments", "freeze_last"):
        return {"method": method, "num_blocks": strategy.num_blocks}
    if method == "e2e" or strategy.is_peer:
        return {"method": method}
    local = {"num_blocks": strategy.num_blocks, "tied_embeddings": settings.tied_embeddings}
    if method == "ppll":
        return {"num_stages": strategy.num_stages, "split": "even", "gradient": "local", **local, **early}
    local |= method_arguments(method, strategy.num_blocks, strategy.task_reach)
    if method == "mlaan":
        return local
    if "task_reach" in local:
        return {"method": "lopt", **local, "reach_unit": settings.reach_unit}
    return {"method": "lopt", **local, **({} if method == "freeze" else early)}


def _common(plan: Plan, row: PlanRow, dataset: str) -> dict[str, Any]:
    settings, strategy = plan.settings, row.strategy
    short_name = settings.model.rstrip("/").rpartition("/")[2].lower()
    return {
        "model_name_or_path": settings.model,
        "dtype": settings.dtype,
        "attn_implementation": "sdpa",
        "dataset_name": dataset,
        "max_length": settings.seq_length,
        "num_train_epochs": 1,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.accumulation_steps,
        "learning_rate": LORA_LEARNING_RATE if strategy.method == "lora" else LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0 if strategy.method == "e2e_step_in_backward" else 1.0,
        "optim": settings.optim,
        "bf16": True,
        "activation_checkpointing": strategy.checkpointing,
        "seed": 42,
        "output_dir": f"out/{short_name}-{strategy.method}",
        "logging_steps": 10,
        "report_to": "none",
    }
