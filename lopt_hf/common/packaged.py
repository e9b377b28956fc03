"""Recipes, experiments and accelerate configurations that the package carries, and where a name leads to.

In a wheel they are data of the package; in a checkout, an editable install too, they are the folders of the same names
beside it.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from lopt_hf.common.settings import nearest

__all__ = ["command_of", "find_accelerate_config", "find_config", "list_configs", "packaged_file", "purpose_of"]

FOLDERS = ("recipes", "experiments")
ACCELERATE_CONFIGS = "accelerate_configs"
_COMMANDS = {"retention": "compare"}  # of a folder's files; all other folders have their command's name


def _folder(name: str) -> Path:
    package = Path(str(files("lopt_hf")))
    return package / name if (package / name).is_dir() else package.parent / name


def list_configs() -> dict[str, Path]:
    """Returns the files by their names, which are paths without suffix such as `smollm2-135m/sft/lopt_k2`."""
    found = {}
    for folder in map(_folder, FOLDERS):
        for path in sorted(folder.rglob("*.yaml")):
            found[path.relative_to(folder).with_suffix("").as_posix()] = path
    return found


def packaged_file(name: str) -> Path:
    """Returns the path of a file by its name.

    Args:
        name: The name, with or without `.yaml` and the `recipes/` or `experiments/` of a checkout.

    Raises:
        ValueError: If there is none of that name; the message has the nearest.
    """
    known, wanted = list_configs(), _without_folder(name)
    if wanted not in known:
        raise ValueError(f"there is no recipe {name!r}; {_hint(wanted, list(known))}.")
    return known[wanted]


def find_config(name: str | Path) -> Path:
    """Returns the file that `--config` means: a path that exists, or else what the package has under that name.

    Args:
        name: A path, or a name as `packaged_file` takes.

    Raises:
        FileNotFoundError: If there is neither; the message has the nearest name.
    """
    if Path(name).exists():
        return Path(name)
    try:
        return packaged_file(str(name))
    except ValueError:
        hint = _hint(_without_folder(str(name)), list(_runs()))
        raise FileNotFoundError(f"there is no file {str(name)!r} here, nor a recipe of that name; {hint}.") from None


def find_accelerate_config(name: str) -> Path:
    """Returns the configuration file for `accelerate launch`: a path that exists, or the package's of that name.

    Args:
        name: A path, or a name such as `ddp_2`.

    Raises:
        ValueError: If there is neither; the message has the nearest name.
    """
    if Path(name).is_file():
        return Path(name)
    prefix = f"{ACCELERATE_CONFIGS}/"
    known = {each.removeprefix(prefix): path for each, path in list_configs().items() if each.startswith(prefix)}
    wanted = _without_folder(name).removeprefix(prefix)
    if wanted not in known:
        (found,) = nearest(wanted, known, cutoff=0.0)
        raise ValueError(
            f"accelerate_config={name!r} is no file here, nor one of the package's, nearest is {found!r}; use "
            f"{', '.join(known)}, or a path."
        )
    return known[wanted]


def command_of(name: str) -> str | None:
    """Returns the command that reads a recipe, after `lopt-hf`; `None` for an accelerate configuration."""
    folder = name.split("/")[-2]
    return None if folder == ACCELERATE_CONFIGS else _COMMANDS.get(folder, folder)


def purpose_of(path: Path) -> str:
    """Returns what a file's first comment says of it, up to its first full stop."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.removeprefix("#").strip()
        if not line.startswith("#") or not text:
            break
        words.append(text)
        if text.endswith((".", "?")):
            break
    return " ".join(words)


def _runs() -> list[str]:
    return [name for name in list_configs() if command_of(name) is not None]


def _without_folder(name: str) -> str:
    parts = Path(name.removesuffix(".yaml")).parts
    return "/".join(parts[1:] if parts[:1] and parts[0] in FOLDERS else parts)


def _hint(wanted: str, known: Sequence[str]) -> str:
    """The nearest name, by the whole of it or by its last part, if one is near; and where all are."""
    ends = {name.rpartition("/")[2]: name for name in reversed(known)}
    found = nearest(wanted, known)
    if not found and (end := nearest(wanted.rpartition("/")[2], ends)):
        found = [ends[end[0]]]
    near = f"nearest is {found[0]!r}, and " if found else ""
    return f"{near}`lopt-hf recipes` lists all"
