"""The code of a user's own tasks, which decides their scores as their configuration does."""

import hashlib
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


def own_code(task: Task) -> str | None:
    """Returns a digest of the files behind a task's class and the functions and classes that its configuration names.

    Args:
        task: The task.

    Returns:
        `None` if all of them are lm-eval's, lopt_hf's or Python's own.
    """
    parts: list[Any] = [type(task), *_callables(task.config.to_dict(keep_callable=True))]
    digests = {hashlib.sha256(file.read_bytes()).hexdigest() for part in parts for file in _own_files(part)}
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest() if digests else None


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
        if not any(path.is_relative_to(folder) for folder in LIBRARIES):
            yield path
