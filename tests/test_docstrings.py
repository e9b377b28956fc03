"""Everything public has a docstring, its own or that of what it overrides."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import lopt_hf


def undocumented(module: ModuleType) -> Iterator[str]:
    """Yields the names of what a module makes public without a docstring."""
    for name, value in vars(module).items():
        is_own = getattr(value, "__module__", None) == module.__name__
        if name.startswith("_") or not is_own or not (inspect.isfunction(value) or inspect.isclass(value)):
            continue
        if not inspect.getdoc(value):
            yield f"{module.__name__}.{name}"
        if inspect.isclass(value):
            yield from (f"{module.__name__}.{name}.{method}" for method in undocumented_methods(value))


def undocumented_methods(cls: type) -> Iterator[str]:
    for name, value in vars(cls).items():
        function: Any = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        is_method = inspect.isfunction(function) and function.__qualname__ == f"{cls.__qualname__}.{name}"
        if not name.startswith("_") and is_method and not inspect.getdoc(getattr(cls, name)):
            yield name


def test_everything_public_has_a_docstring():
    names = [info.name for info in pkgutil.walk_packages(lopt_hf.__path__, "lopt_hf.")]
    assert len(names) > 150
    assert [name for module in map(importlib.import_module, names) for name in undocumented(module)] == []


class Documented:
    """A class."""

    def method(self):
        """Does something."""


class Overriding(Documented):
    """A class that documents nothing of its own."""

    def method(self):
        pass

    def other(self):
        pass

    @property
    def value(self):
        return 1


def test_what_has_none_is_found():
    assert list(undocumented_methods(Overriding)) == ["other", "value"]
