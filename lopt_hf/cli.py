"""`lopt-hf <command>`: dispatch to the scripts, which do the work."""

import importlib
import sys
from collections.abc import Sequence

from lopt_hf import __version__
from lopt_hf.common.launching import INTERRUPTED

__all__ = ["main"]

COMMANDS = {
    "demo": "fine-tune a real 135M model on this machine in a few minutes and compare before and after",
    "plan": "tell what a run will need, by strategy, without weights or a GPU, and write the cheapest that fits",
    "recipes": "list the recipes that come with the package, print one, or copy them",
    "sft": "supervised fine-tuning with LoPT (or end-to-end, for comparison) from a YAML or from arguments",
    "mlaan": "the same with MLAAN: early blocks learn the task through auxiliaries and in windows",
    "peers": "the same by LISA, BAdam, or end-to-end with less memory, to compare with",
    "dpo": "preference optimisation with LoPT (or end-to-end), from chosen and rejected answers",
    "grpo": "reinforcement learning from verifiable rewards with LoPT (or end-to-end)",
    "image": "train an image classifier (ViT, Swin, ResNet) by local learning, MLAAN, reach or end-to-end",
    "pipeline": "supervised fine-tuning in a pipeline of processes, one per stage, without bubbles",
    "repl": "replace layers of a pretrained model by cheap surrogates, heal it, compare with plain removal",
    "retention": "measure what fine-tuned models kept of what their base knew, with paired intervals",
    "compare": "fine-tune by several methods, rates and seeds, and report gain against retention",
    "curves": "draw what training runs logged, such as GRPO's reward, and print how it changed",
    "bench": "measure memory and time per step against end-to-end training",
}


def _usage() -> str:
    rows = "\n".join(f"  {name:<10} {purpose}" for name, purpose in COMMANDS.items())
    return (
        "usage: lopt-hf <command> [options]\n\nLocal learning for LLM post-training with Hugging Face.\n\n"
        f"commands:\n{rows}\n\n`lopt-hf <command> --help` tells a command's options. On several devices: "
        "`lopt-hf <command> --accelerate_config ddp_8 [options]`. `lopt-hf --version` tells the version.\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command named by the first argument.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in ("-h", "--help"):
        print(_usage(), end="")
        return
    if arguments and arguments[0] == "--version":
        print(f"lopt-hf {__version__}")
        return
    if not arguments or arguments[0] not in COMMANDS:
        given = f"unknown command {arguments[0]!r}" if arguments else "no command given"
        print(f"lopt-hf: error: {given}; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        sys.exit(2)
    try:
        importlib.import_module(f"lopt_hf.scripts.{arguments[0]}").main(arguments[1:])
    except KeyboardInterrupt:
        print(f"\nlopt-hf {arguments[0]}: interrupted.", file=sys.stderr)
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
