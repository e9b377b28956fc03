"""The methods that `lopt-hf bench step`, `lopt-hf compare` and `lopt-hf plan` compare: names, labels, settings."""

from collections.abc import Sequence
from typing import Any

__all__ = [
    "CUTS",
    "PEERS",
    "REPL_EVERY",
    "check_reach",
    "method_arguments",
    "mlaan_window",
    "reach_cycle",
    "row_label",
    "spread_layers",
]

REPL_EVERY = 4  # RepL, arXiv 2605.19533: every 4th layer

# What trains by the task loss alone with a stock trainer, in `lopt_hf.peers`
PEERS = ("e2e_segments", "e2e_step_in_backward", "freeze_last", "lisa", "badam")
# What cuts the decoder into blocks
CUTS = (
    *("lopt", "lopt_local_step", "reach", "reach_local_step", "joint", "mlaan"),
    *("freeze", "freeze_last", "e2e_segments"),
)

_LABELS = {
    "e2e_segments": "{e2e}, K={blocks} segments",
    "e2e_step_in_backward": "{e2e}, step in backward",
    "freeze_last": "freeze last {frozen} of {blocks} blocks",
    "lisa": "LISA",
    "badam": "BAdam",
    "lopt": "LoPT K={blocks}",
    "lopt_local_step": "LoPT K={blocks}, local step",
    "joint": "LoPT K={blocks}, joint",
    "reach": "K={blocks}, reach {reach}",
    "reach_local_step": "K={blocks}, reach {reach}, local step",
    "mlaan": "MLAAN K={blocks}, window {window}",
    "lora": "LoRA r={rank}",
    "repl": f"RepL, every {REPL_EVERY}th layer",
}

# What makes them of LoPT
_LOPT_ARGUMENTS: dict[str, dict[str, Any]] = {
    "lopt": {"local_backward": "eager"},
    "lopt_local_step": {"local_backward": "eager", "local_step": True},
    "joint": {"local_backward": "joint"},
    "reach": {"local_objective": "none"},
    "reach_local_step": {"local_objective": "none", "local_step": True},
    "freeze": {"train_early_blocks": False},
}


def mlaan_window(num_blocks: int) -> int:
    """Returns the blocks of a window: MLAAN's two (its code), or one where two would be the whole model."""
    return min(2, num_blocks - 1)


def reach_cycle(num_blocks: int, task_reach: Sequence[int] | None) -> tuple[int, ...]:
    """Returns the cycle of reach for a number of blocks: as given, or all of them in a quarter of the steps, first."""
    return (num_blocks, 1, 1, 1) if task_reach is None else tuple(task_reach)


def check_reach(num_blocks: Sequence[int], task_reach: Sequence[int] | None) -> None:
    """Checks that a cycle of reach goes with one of the numbers of blocks.

    Raises:
        ValueError: If it doesn't; the message names both and the fix.
    """
    if task_reach is None:
        return
    if not task_reach or min(task_reach) < 1:
        raise ValueError(f"task_reach={task_reach}: a reach is 1 (the last block) or more; drop the others.")
    if max(task_reach) not in num_blocks:
        raise ValueError(
            f"task_reach={task_reach} reaches {max(task_reach)} blocks, which num_blocks={num_blocks} does not name; "
            f"add {max(task_reach)} to num_blocks, so that every block is trained."
        )


def row_label(
    method: str,
    num_blocks: int = 2,
    rank: int = 16,
    end_to_end: str = "end-to-end",
    task_reach: Sequence[int] | None = None,
) -> str:
    """Returns what a method's row is called in a table.

    Args:
        method: The method.
        num_blocks: Blocks or segments of the decoder.
        rank: Rank of adapters.
        end_to_end: What the table calls end-to-end training.
        task_reach: A cycle of reach. Default: see `reach_cycle`.
    """
    values: dict[str, object] = {"blocks": num_blocks, "frozen": num_blocks - 1, "window": mlaan_window(num_blocks)}
    values["reach"] = ",".join(map(str, reach_cycle(num_blocks, task_reach)))
    return _LABELS[method].format(**values, rank=rank, e2e=end_to_end)


def method_arguments(method: str, num_blocks: int, task_reach: Sequence[int] | None = None) -> dict[str, Any]:
    """Returns what makes a method of local learning: `MLAANArguments` for `"mlaan"`, `LoPTArguments` for the others.

    Args:
        method: The method.
        num_blocks: Blocks of the decoder.
        task_reach: A cycle of reach. Default: see `reach_cycle`.
    """
    if method == "mlaan":
        return {"window": mlaan_window(num_blocks)}
    reach = {"task_reach": list(reach_cycle(num_blocks, task_reach))} if method.startswith("reach") else {}
    return reach | _LOPT_ARGUMENTS[method]


def spread_layers(num_layers: int, count: int) -> list[int]:
    """Returns layers spread evenly over the depth; what they cost on average, all of them cost.

    That is so for a method that trains one layer at a time, with a backward that ends there: its cost is linear in the
    layer's place.

    Args:
        num_layers: Decoder layers of the model.
        count: How many to return, at most all.
    """
    count = min(count, num_layers)
    lower = [int((2 * i + 1) * num_layers / (2 * count)) for i in range(count // 2)]
    middle = [num_layers // 2] if count % 2 else []
    return [*lower, *middle, *(num_layers - 1 - layer for layer in reversed(lower))]
