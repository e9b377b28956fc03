"""The code of a user's own tasks, which decides their scores as their configuration does."""

import ast
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.api.task import Task

__all__ = ["own_code"]

# Of lm-eval's tasks and ours the version and the configuration tell enough
LIBRARIES = (Path(lm_eval.__file__).parent, Path(__file__).parents[1])
INSTALLED = frozenset({"site-packages", "dist-packages"})  # where no user edits a helper
# What code may read beside itself; larger files are a task's documents, which are told apart by themselves
DATA_SUFFIXES = frozenset({".csv", ".json", ".jsonl", ".toml", ".tsv", ".txt"})
MAX_DATA_BYTES = 2**20


def own_code(task: Task) -> str | None:
    """Returns a digest of the files behind a task's class and the functions and classes that its configuration names.

    With them count the user's own files that these import, and those that these import in turn, and the small files of
    data beside all of them, which they may read.

    Args:
        task: The task.

    Returns:
        `None` if all of them are lm-eval's, lopt_hf's or Python's own.
    """
    parts: list[Any] = [type(task), *_callables(task.config.to_dict(keep_callable=True))]
    files = _with_imported({file for part in parts for file in _own_files(part)})
    files |= {data for folder in {file.parent for file in files} for data in _data_files(folder)}
    digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest() if digests else None


def _data_files(folder: Path) -> Iterator[Path]:
    """The small files of data in a user's own folder, not those in folders within it."""
    if INSTALLED.intersection(folder.parts):
        return
    for path in folder.iterdir():
        if path.suffix in DATA_SUFFIXES and path.is_file() and path.stat().st_size <= MAX_DATA_BYTES:
            yield path


def _callables(value: Any) -> Iterator[Callable[..., Any]]:
    """All functions and classes in a configuration, in whatever depth; of other objects with a call their class."""
    if isinstance(value, partial):
        yield from _callables([value.func, *value.args, value.keywords])
    elif isinstance(value, Mapping):
        yield from _callables(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _callables(part)
    elif callable(value):
        yield value if inspect.isroutine(value) or inspect.isclass(value) else type(value)


def _own_files(part: Callable[..., Any]) -> Iterator[Path]:
    """The files of a function, or of a class and those that it inherits from."""
    for each in inspect.getmro(part) if inspect.isclass(part) else [part]:
        name = str(each.__module__)
        file = getattr(sys.modules.get(name), "__file__", None)
        if file is None or name.partition(".")[0] in sys.stdlib_module_names:
            continue
        path = Path(file)
        if not _is_of_libraries(path):
            yield path


def _is_of_libraries(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in LIBRARIES)


def _with_imported(files: set[Path]) -> set[Path]:
    """The files, and the user's own that they import, in whatever depth."""
    found, left = set(files), list(files)
    while left:
        imported = set(_imported_files(left.pop())) - found
        found |= imported
        left += imported
    return found


def _imported_files(file: Path) -> Iterator[Path]:
    """The user's own files that one names in its imports, inside functions too, which run only later."""
    if file.suffix != ".py" or INSTALLED.intersection(file.parts):
        return
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(_folder_of(alias.name), alias.name)
        elif isinstance(node, ast.ImportFrom):
            name = node.module or ""
            folder = file.parents[node.level - 1] if node.level else _folder_of(name)
            for alias in node.names:  # a module, or something in it
                yield from _module_files(folder, f"{name}.{alias.name}".removeprefix("."))


def _folder_of(module: str) -> Path | None:
    """Where the outermost package of a module is, if that is a user's own; nothing is imported for it."""
    name = module.partition(".")[0]
    if name in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module that was made without one
        return None
    places: list[str | None] = [] if spec is None else [*(spec.submodule_search_locations or ()), spec.origin]
    place = next(iter(places), None)
    if place is None or INSTALLED.intersection(Path(place).parts) or _is_of_libraries(Path(place)):
        return None
    return Path(place).parent


def _module_files(folder: Path | None, name: str) -> Iterator[Path]:
    """The files of a module in a folder and of the packages that it is in."""
    if folder is None:
        return
    path = folder
    for part in name.split("."):
        path = path / part
        yield from (file for file in (path.with_name(f"{part}.py"), path / "__init__.py") if file.is_file())
