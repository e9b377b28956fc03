"""The commands that pages show: read as a shell would, and parsed by the parsers of the commands themselves."""

import re
import shlex
import sys
from collections.abc import Iterator

from lopt_hf.common.packaged import find_accelerate_config, find_config
from lopt_hf.compare.grid import load_grid
from lopt_hf.scripts import (
    bench,
    compare,
    curves,
    demo,
    dpo,
    grpo,
    image,
    mlaan,
    peers,
    pipeline,
    pipeline_export,
    pipeline_simulate,
    plan,
    recipes,
    repl,
    retention,
    sft,
)
from lopt_hf.scripts.parsing import chosen, chosen_method, parse_or_exit
from lopt_hf.scripts.settings import with_dashes
from tests.docs.markdown import blocks

PLAIN = {
    "bench": bench,
    "compare": compare,
    "curves": curves,
    "demo": demo,
    "pipeline export": pipeline_export,
    "pipeline simulate": pipeline_simulate,
    "plan": plan,
    "recipes": recipes,
    "retention": retention,
}
RECIPES = {
    "sft": lambda arguments: sft.make_parser(chosen_method(arguments)),
    "pipeline": lambda arguments: pipeline.make_parser(chosen_method(arguments), chosen("task", arguments, "sft")),
    "dpo": lambda _: dpo.make_parser(),
    "grpo": lambda _: grpo.make_parser(),
    "image": lambda arguments: image.make_parser(chosen_method(arguments)),
    "mlaan": lambda _: mlaan.make_parser(),
    "peers": lambda _: peers.make_parser(),
    "repl": lambda _: repl.make_parser(),
}
INLINE = re.compile(
    rf"`(lopt-hf (?:{'|'.join(RECIPES)}) [^`]*-[^`]*)`"
)  # whole commands; of others a text names options


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of each command of a page: of its blocks in bash, and of `lopt-hf` commands in its text.

    What a shell would have to fill in (`$recipe`, `…`) is left out.
    """
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|; do|; done|;", line):
                if "$" not in part and "…" not in part and "..." not in part:
                    yield shlex.split(part, comments=True)
    for found in INLINE.findall(text):
        if "…" not in found and "..." not in found and "\n" not in found:
            yield shlex.split(found)


def as_command(words: list[str]) -> tuple[str, list[str]] | None:
    """The name of a `lopt-hf` command and its arguments, however it is launched; `None` of another command."""
    while words and "=" in words[0] and not words[0].startswith("-"):
        words = words[1:]  # variables of the environment
    if words[:1] == ["lopt-hf"]:
        name, arguments = words[1], words[2:]
    elif words[:2] == ["accelerate", "launch"]:
        module = words.index("-m") + 1
        launched, name, arguments = words[2 : module - 1], words[module].rpartition(".")[2], words[module + 1 :]
        if "--config_file" in launched:
            assert find_accelerate_config(launched[launched.index("--config_file") + 1]).is_file(), launched
        assert words[module] == f"lopt_hf.scripts.{name}"
    else:
        return None
    if arguments and f"{name} {arguments[0]}" in PLAIN:
        name, arguments = f"{name} {arguments[0]}", arguments[1:]
    return name, arguments


def parse(name: str, arguments: list[str]) -> None:
    """Parses a command's arguments from the repository's root, as the command itself does, and runs nothing.

    Raises:
        SystemExit: If the command would refuse them.
    """
    if name in RECIPES:
        own = (
            arguments
            if "--output_dir" in arguments or "--config" in arguments
            else [*arguments, "--output_dir", "out"]
        )
        parse_or_exit(RECIPES[name](own), own)
        return
    if name not in PLAIN:
        sys.exit(f"there is no command lopt-hf {name}")
    given = with_dashes(arguments)
    kinds = [chosen("task", given, "sft")] if name == "bench" else []
    options = PLAIN[name].make_parser(*kinds).parse_args(given)
    if name == "compare":
        load_grid(find_config(options.config))
