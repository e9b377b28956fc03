"""What a command tells the model card: data and command line, without what is nobody else's business."""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lopt_hf.scripts.launching import LAUNCHED

__all__ = ["describe_data", "is_of_hub", "public_command"]

# In the name of an option, or of an entry of one
_SECRETS = ("secret", "password", "api_key", "apikey", "credential")
_SPECIAL_TOKENS = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")  # which are no secrets
_ACCESS_TOKEN = re.compile(r"\bhf_\w+")


def is_of_hub(script_args: Any) -> bool:
    """Tells whether the data are the hub's: neither generated nor a file or folder here."""
    name = script_args.dataset_name
    return name is not None and not script_args.is_generated and not Path(name).expanduser().exists()


def describe_data(script_args: Any) -> str:
    """Returns which data were trained on; of local ones their name without its folder.

    Args:
        script_args: The `DataArguments` of a run whose data are loaded.
    """
    name = str(script_args.dataset_name)
    if script_args.is_generated:
        source = f"`{name}`, which lopt_hf generates"
    elif not is_of_hub(script_args):
        source = f"a local file or folder, `{Path(name).name}`"
    else:
        config = "" if script_args.dataset_config is None else f", configuration `{script_args.dataset_config}`"
        source = f"[{name}](https://huggingface.co/datasets/{name}){config}, split `{script_args.dataset_train_split}`"
    rows = script_args.dataset_max_samples
    return source if rows is None else f"{source}; {rows:,} rows"


def public_command(command: str, argv: Sequence[str] | None) -> str:
    """Returns the command line, without secrets, and of absolute paths only the last part.

    Args:
        command: The name after `lopt-hf`.
        argv: Its arguments; default: those of the process, or of the command that has launched it.
    """
    launched = os.environ.get(LAUNCHED)
    given = shlex.split(launched) if launched else list(sys.argv[1:] if argv is None else argv)
    parts, is_secret = [], False
    for part in given:
        name, equals, value = part.partition("=") if part.startswith("--") else ("", "", part)
        hidden = is_secret or (equals and _is_secret(name))
        is_secret = part.startswith("--") and not equals and _is_secret(part)
        parts.append(f"{name}{equals}{'...' if hidden else _public(value)}")
    return shlex.join(["lopt-hf", command, *parts])


def _is_secret(name: str) -> bool:
    """Tells whether something of this name is nobody else's business."""
    words = name.lstrip("-").replace("-", "_").lower()
    kind, _, last = words.rpartition("_")
    return any(secret in words for secret in _SECRETS) or (last == "token" and kind not in _SPECIAL_TOKENS)


def _public(value: str) -> str:
    """Returns a value without access tokens, and without the folder of a path."""
    with contextlib.suppress(ValueError):
        entries = json.loads(value)
        if isinstance(entries, dict):
            value = json.dumps(_public_entries(entries), ensure_ascii=False)
    return _ACCESS_TOKEN.sub("...", _last_part(value))


def _public_entries(entries: Any) -> Any:
    if isinstance(entries, dict):
        return {name: "..." if _is_secret(name) else _public_entries(entry) for name, entry in entries.items()}
    return _last_part(entries) if isinstance(entries, str) else entries


def _last_part(value: str) -> str:
    return Path(value).name if value.startswith(("/", "~")) else value
