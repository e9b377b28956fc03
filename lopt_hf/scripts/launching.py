"""`--accelerate_config`: a training command that starts itself by `accelerate launch`, as TRL's commands do."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lopt_hf.common.launching import LAUNCHER, ON_THIS_HOST, run_launcher
from lopt_hf.common.packaged import find_accelerate_config
from lopt_hf.common.yaml_files import load_settings
from lopt_hf.scripts.parsing import chosen
from lopt_hf.scripts.settings import UsageExit

__all__ = ["LAUNCHED", "launch_if_asked"]

# Set for the launched processes, to the arguments of the command that launches them. `RANK` is not there where the
# configuration has one process only.
LAUNCHED = "LOPT_HF_LAUNCHED"
# The launcher's options that may follow: those that a machine or a job decides
_OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port", "gpu_ids")


def launch_if_asked(
    command: str, argv: Sequence[str] | None, check: Callable[[Sequence[str]], Any] = lambda arguments: None
) -> None:
    """Runs a command under `accelerate launch` and ends with its status, if `--accelerate_config` asks for that.

    Without it, and in a process that was launched with it, nothing happens.

    Args:
        command: The name after `lopt-hf`.
        argv: Its arguments; default: those of the process.
        check: Called with the arguments that the launched processes get, before they are started. What is wrong with
            them is then told once.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    given, rest = _parser(command).parse_known_args(arguments)
    name = given.accelerate_config or _named_in_recipe(arguments)
    if LAUNCHED in os.environ or name is None:
        return
    if "RANK" in os.environ:
        if given.accelerate_config is None:
            return  # the recipe's, and this launch is in its place
        raise UsageExit(
            f"lopt-hf {command}: error: accelerate_config={name!r}, but `accelerate launch` has started this process; "
            "leave out one of the two."
        )
    try:
        path = find_accelerate_config(name)
        launcher = [*LAUNCHER, "--config_file", str(path), *_options(given, path)]
    except (ValueError, OSError) as error:
        raise UsageExit(f"lopt-hf {command}: error: {error}") from error
    check(rest)
    sys.exit(run_launcher([*launcher, "-m", f"lopt_hf.scripts.{command}", *rest], {LAUNCHED: shlex.join(arguments)}))


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"lopt-hf {command}", add_help=False, allow_abbrev=False)
    for name in ("accelerate_config", *_OPTIONS):
        parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}")
    return parser


def _named_in_recipe(arguments: Sequence[str]) -> str | None:
    """The `accelerate_config` of the YAML, which the command's own parser reads again, and checks."""
    name = chosen("accelerate_config", arguments, "")
    return name if name and isinstance(name, str) else None


def _options(given: argparse.Namespace, path: Path) -> list[str]:
    """The launcher's own options; on one machine its processes meet there, at any free port unless one is given."""
    options = {name: value for name in _OPTIONS if (value := getattr(given, name)) is not None}
    settings = load_settings(path)
    num_processes = str(options.get("num_processes", 1))
    if settings.get("distributed_type") == "NO" and num_processes != "1":
        raise ValueError(
            f"num_processes={num_processes} has no effect with accelerate_config={path.stem!r}, which starts one "
            "process (distributed_type: NO); choose a configuration of several, such as ddp_2."
        )
    num_machines = str(options.get("num_machines", settings.get("num_machines", 1)))
    meeting: list[str] = []
    if num_machines == "1" and settings.get("rdzv_backend", "static") == "static":
        port = options.pop("main_process_port", None) or settings.get("main_process_port")
        meeting = [*ON_THIS_HOST, *(("--rdzv_conf", f"port={port}") if port else ())]
    return [part for name, value in options.items() for part in (f"--{name}", value)] + meeting
