"""List the recipes that come with the package, print one, or copy them to change them.

examples:
  lopt-hf recipes                                                   # all, with a line each
  lopt-hf recipes smollm2-135m/sft/reach_k2                         # prints it
  lopt-hf recipes smollm2-135m/sft/reach_k2 --copy my-recipes       # nothing is overwritten
  lopt-hf sft --config smollm2-135m/sft/reach_k2                    # runs it; what follows wins over its settings
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

from lopt_hf.common.files import atomic_file
from lopt_hf.common.packaged import command_of, list_configs, packaged_file, purpose_of
from lopt_hf.common.settings import check_folder
from lopt_hf.scripts.settings import OneLineParser

__all__ = ["main", "make_parser"]


def make_parser() -> OneLineParser:
    """Makes the parser of this command."""
    parser = OneLineParser("recipes", __doc__)
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this one; it may be a folder, to list it")
    parser.add_argument("--copy", type=Path, metavar="FOLDER", help="copy NAME, or all, into this folder")
    return parser


def _chosen(name: str | None) -> tuple[dict[str, Path], bool]:
    """The files that a name means, and whether it may be several: those of a folder, or all.

    Raises:
        ValueError: If there is none.
    """
    known = list_configs()
    if name is None:
        return known, True
    inside = {each: path for each, path in known.items() if each.startswith(f"{name.rstrip('/')}/")}
    if inside:
        return inside, True
    path = packaged_file(name)
    return {each: path for each, other in known.items() if other == path}, False


def _title(command: str | None) -> str:
    if command is None:
        return "lopt-hf sft, dpo, grpo, mlaan, peers or pipeline --accelerate_config NAME"
    return f"lopt-hf {command} --config NAME"


def _table(found: dict[str, Path]) -> str:
    """The names with their purposes, below the command that takes them."""
    commands = dict.fromkeys(sorted((command_of(name) for name in found), key=lambda name: (name is None, name)))
    blocks = []
    for command in commands:
        rows = {name: purpose_of(path) for name, path in found.items() if command_of(name) == command}
        if command is None:
            rows = {name.rpartition("/")[2]: purpose for name, purpose in rows.items()}
        width = max(map(len, rows))
        lines = (f"  {name:<{width}}  {purpose}" for name, purpose in rows.items())
        blocks.append("\n".join([_title(command), *lines]))
    return "\n\n".join(blocks)


def _copy(found: dict[str, Path], folder: Path) -> None:
    """Copies files into a folder, under their names.

    Raises:
        ValueError: Before anything is copied, if a file is there already, or in the folder's place.
    """
    check_folder("copy", folder)
    targets = {name: folder / f"{name}.yaml" for name in found}
    for target in targets.values():
        if target.exists():
            raise ValueError(f"copy={str(folder)!r}: {target} exists and is not overwritten; name another folder.")
    for name, target in targets.items():
        with atomic_file(target) as partial:
            shutil.copyfile(found[name], partial)
        command = command_of(name)
        print(target if command is None else f"lopt-hf {command} --config {target}")


def _run(options: argparse.Namespace) -> None:
    found, is_list = _chosen(options.name)
    if options.copy is not None:
        _copy(found, options.copy)
    elif is_list:
        print(_table(found))
    else:
        (path,) = found.values()
        print(path.read_text(encoding="utf-8"), end="")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        argv: Arguments without the program's name; default: those of the process.
    """
    make_parser().run(_run, argv)


if __name__ == "__main__":
    main()
