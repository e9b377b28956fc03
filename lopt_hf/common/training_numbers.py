"""Numbers of training arguments that transformers and TRL accept, and with which a run goes wrong."""

import math
from typing import Any

__all__ = ["check_training_numbers"]

_ABOVE_ZERO = (math.ulp(0.0), math.inf, "a number above 0")
_FROM_ZERO = (0, math.inf, "a number from 0 on")
_FROM_ONE = (1, math.inf, "at least 1")
_BELOW_ONE = (0, 1, "a number from 0 to below 1")

# Name -> lowest value, bound that is not reached, what the value must be; a field that a config lacks is skipped
_RANGES: dict[str, tuple[float, float, str]] = {
    **dict.fromkeys(("learning_rate", "max_grad_norm", "weight_decay", "adam_epsilon"), _FROM_ZERO),
    **dict.fromkeys(("neftune_noise_alpha", "epsilon", "save_total_limit", "top_k"), _FROM_ZERO),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), _BELOW_ONE),
    **dict.fromkeys(("max_length", "max_completion_length", "per_device_train_batch_size"), _FROM_ONE),
    **dict.fromkeys(("per_device_eval_batch_size", "gradient_accumulation_steps"), _FROM_ONE),
    **dict.fromkeys(("precompute_ref_batch_size",), _FROM_ONE),
    **dict.fromkeys(("temperature", "repetition_penalty"), _ABOVE_ZERO),
    "top_p": (math.ulp(0.0), math.nextafter(1, 2), "a number above 0, up to 1"),
    "label_smoothing": (0, 0.5, "a number from 0 to below 0.5"),
    "ref_model_mixup_alpha": (0, math.nextafter(1, 2), "a number from 0 to 1"),
    "seed": (0, 2**32, "a whole number from 0 to 2**32 - 1"),
}


def check_training_numbers(args: Any, beta_is_positive: bool = False) -> None:
    """Checks the numbers of a trainer's arguments, before the parents' own checks.

    Args:
        args: The arguments.
        beta_is_positive: Whether `beta` must be above 0, as DPO's, which scales its reward; of GRPO it is a weight.

    Raises:
        ValueError: If one is out of its range; names field, value and what it must be.
    """
    ranges = {**_RANGES, "beta": _ABOVE_ZERO if beta_is_positive else _FROM_ZERO}
    for name, (lowest, bound, what) in ranges.items():
        value = getattr(args, name, None)
        if isinstance(value, int | float) and not lowest <= value < bound:
            raise ValueError(f"{name}={value} must be {what}.")
    for event in ("logging", "save", "eval"):
        value = getattr(args, f"{event}_steps")
        if getattr(args, f"{event}_strategy") == "steps" and value is not None and not value > 0:
            raise ValueError(f"{event}_steps={value} must be above 0, or set {event}_strategy to 'no'.")
    if args.max_steps != -1 and args.max_steps < 1:
        raise ValueError(f"max_steps={args.max_steps} must be at least 1, or -1 for num_train_epochs.")
    if args.max_steps == -1 and not args.num_train_epochs > 0:
        raise ValueError(f"num_train_epochs={args.num_train_epochs} must be a number above 0; or set max_steps.")
    if args.warmup_steps >= 1 and args.warmup_steps != int(args.warmup_steps):
        raise ValueError(f"warmup_steps={args.warmup_steps} must be a whole number, or a share of the steps below 1.")
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise ValueError("load_best_model_at_end=True needs evaluations; set eval_strategy to 'steps'.")
