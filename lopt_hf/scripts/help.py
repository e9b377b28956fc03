"""Help of the commands whose options are hundreds of fields: the common ones first, all of them on request."""

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["COMMON", "HelpAll", "HelpFormatter", "correct_help", "format_sections", "without_fences"]

# What recipes set and nearly every run needs, of this package, transformers and TRL
COMMON = (
    *("model_name_or_path", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
    *(
        "dataset_max_samples",
        "accelerate_config",
        "method",
        "reward_funcs",
        "output_dir",
        "resume_from_checkpoint",
        "seed",
    ),
    *("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm"),
    *("max_length", "packing", "dtype", "bf16", "activation_checkpointing"),
    *("max_completion_length", "num_generations", "temperature", "beta"),
    *("logging_steps", "save_strategy", "save_steps", "save_total_limit", "eval_strategy", "eval_steps"),
    *("report_to", "push_to_hub", "use_peft", "lora_r", "lora_alpha", "lora_target_modules", "load_in_4bit"),
)
_LIBRARIES = ("transformers", "trl")
_TRL_BF16 = "If not set, it defaults to `True` if `fp16` is not set."  # which is so on an accelerator alone
_BF16 = (
    "Mixed precision in bf16 instead of fp32. Default, unless fp16 is set: True on an accelerator; on a CPU the "
    "faster of bf16 and fp32, by measuring."
)
_RESUME = "A checkpoint's folder; true: the last one in output_dir; auto: likewise, or anew if there is none."
_FENCE = "```"
_LONG_CHOICES = 60  # characters from which choices stand in the text, which is wrapped


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's lines, spells each option one way, and names its default where that says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if not _is_spelt_with_dashes(name)]
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(names or action.option_strings) + (f" {value}" if action.nargs != 0 else "")

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Any:
        if action.metavar is None and _has_long_choices(action):
            return lambda size: (default_metavar,) * size
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if _has_long_choices(action):
            text += f" One of {', '.join(map(str, action.choices or ()))}."
        says_default = action.default is None or "Default:" in text or action.nargs == 0
        return text if says_default else f"{text} (default: %(default)s)"


class HelpAll(argparse.Action):
    """Prints the help with all options, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: Any, *_: Any) -> None:
        print(format_sections(parser, parser.dataclass_types, shows_all=True), end="")
        parser.exit()


def correct_help(parser: argparse.ArgumentParser, dataclass_types: Iterable[type]) -> None:
    """Corrects the libraries' help where it is not so in the commands of this package, or lacks a default.

    Args:
        parser: What has the options.
        dataclass_types: Whose fields they are.
    """
    kinds: list[Any] = list(dataclass_types)
    defaults = {name: each.default for kind in kinds for name, each in kind.__dataclass_fields__.items()}
    idle = _idle_options(kinds)
    added = {  # where the option has no default of its own
        "activation_checkpointing": f" Default: {bool(defaults.get('gradient_checkpointing'))}.",  # its older name
        "output_dir": " Default: trainer_output.",
    }
    for action in parser._actions:
        text = action.help or ""
        if action.dest == "bf16" and _TRL_BF16 in text:
            text = _BF16
        elif action.dest == "resume_from_checkpoint" and action.dest not in idle:
            text = _RESUME
        elif action.default is None:
            text += added.get(action.dest, "")
        action.help = text


def without_fences(text: str) -> str:
    """Returns a docstring as a terminal shows it: what stands between code fences indented, without them."""
    lines, is_code = [], False
    for line in text.splitlines():
        if line.startswith(_FENCE):
            is_code = not is_code
        else:
            lines.append(f"  {line}" if is_code and line else line)
    return "\n".join(lines) + "\n" * text.endswith("\n")


def format_sections(parser: argparse.ArgumentParser, dataclass_types: Iterable[type], shows_all: bool) -> str:
    """Formats a parser's help in sections: common options, the others of this package, those of the libraries.

    Args:
        parser: What has the options.
        dataclass_types: Whose fields they are; those that no class of the libraries declares are this package's. What
            a class names in `idle_options` has no use in its command, and stands with the libraries' other options.
        shows_all: Whether the libraries' other options are shown or only counted.
    """
    kinds = list(dataclass_types)
    fields = {name for kind in kinds for name in kind.__dataclass_fields__}  # type: ignore[attr-defined]
    by_name: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if not (action.dest in by_name and action.nargs == 0):  # `--no_x` says what `--x false` does
            by_name.setdefault(action.dest, []).append(action)
    idle = _idle_options(kinds)
    common = [name for name in (*(name for name in by_name if name not in fields), *COMMON) if name in by_name]
    common = [name for name in common if name not in idle]
    own = [name for name in _own_fields(kinds) if name in by_name and name not in common and name not in idle]
    others = [name for name in by_name if name not in common and name not in own]
    sections = {"common options": common, "other options of lopt_hf": own}
    if shows_all:
        sections["other options of transformers and TRL"] = others
    formatter = parser.formatter_class(prog=parser.prog)
    formatter.add_usage(parser.usage, parser._actions, ())
    formatter.add_text(parser.description)
    for title, names in sections.items():
        formatter.start_section(title)
        formatter.add_arguments([action for name in names for action in by_name[name]])
        formatter.end_section()
    if not shows_all:
        formatter.add_text(f"`{parser.prog} --help-all` shows {len(others)} more options of transformers and TRL.")
    return formatter.format_help()


def _idle_options(dataclass_types: Iterable[type]) -> set[str]:
    """Names of the options that have no use in a command, as classes of their fields may say."""
    return {name for kind in dataclass_types for name in getattr(kind, "idle_options", ())}


def _own_fields(dataclass_types: Iterable[type]) -> dict[str, None]:
    """Names in the order in which they are declared."""
    owners = [
        owner for kind in dataclass_types for owner in kind.__mro__ if owner.__module__.split(".")[0] not in _LIBRARIES
    ]
    return dict.fromkeys(name for owner in owners for name in vars(owner).get("__annotations__", {}))


def _is_spelt_with_dashes(name: str) -> bool:
    return "-" in name.removeprefix("--") and name.startswith("--")


def _has_long_choices(action: argparse.Action) -> bool:
    return action.choices is not None and len(",".join(map(str, action.choices))) > _LONG_CHOICES
