"""The methods `reach` and `freeze` of the training commands: settings of LoPT, by the name of what they do."""

from collections.abc import Sequence
from typing import Any

from lopt_hf.scripts.parsing import chosen, is_chosen

__all__ = ["PRESETS", "check_preset", "preset_of"]

PRESETS = ("reach", "freeze")


def preset_of(method: str, argv: Sequence[str] | None) -> dict[str, Any]:
    """Returns what a method sets of LoPT's options where neither the command line nor its YAML does.

    Args:
        method: One of `PRESETS`, or any other, which sets nothing.
        argv: Arguments without the program's name; default: those of the process.
    """
    if method not in PRESETS:
        return {}
    # TRL's checkpointing would leave the blocks little to save.
    settings: dict[str, Any] = {"local_objective": "none"}
    if not is_chosen("gradient_checkpointing", argv):  # the old name, which counts only where the new one is not set
        settings["activation_checkpointing"] = False
    if method == "freeze":
        return settings
    num_blocks = int(given) if (given := str(chosen("num_blocks", argv, "2"))).isdecimal() else 2
    # The first quarter of the run trains all, the others the last half, in as many blocks as there are (docs/reach.md)
    settings |= {"num_blocks": num_blocks, "task_reach": [num_blocks, *[max(num_blocks // 2, 1)] * 3]}
    is_constant = str(chosen("task_reach", argv, "")).strip("[] ").isdecimal()  # and runs over nothing
    return settings if is_constant else settings | {"reach_unit": "run"}


def check_preset(method: str, args: Any) -> None:
    """Checks that arguments are of the method that they were given with.

    Args:
        method: One of `PRESETS`, or any other, of which nothing is asked.
        args: LoPT's arguments.

    Raises:
        ValueError: If they are not; the message names field, value and fix.
    """
    if method == "freeze":
        if args.schedule.highest > 1:
            raise ValueError(
                f"task_reach={args.task_reach} trains early blocks, which method='freeze' does not; leave it out, or "
                "set method to 'reach'."
            )
        if args.local_objective != "none":
            raise ValueError(
                f"local_objective={args.local_objective!r} trains early blocks, which method='freeze' does not; leave "
                "it out, or set method to 'lopt'."
            )
    if method == "reach" and args.schedule.highest == 1:
        raise ValueError(
            f"task_reach={args.task_reach} is freezing the early blocks; with method='reach' leave it out, give a "
            f"cycle such as [1,1,1,{args.num_blocks}], or set method to 'freeze'."
        )
