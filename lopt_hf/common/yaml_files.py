"""The one loader of all YAML that the commands read: 1e-5 is a number, a key stands once, aliases stay small."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

__all__ = ["load_settings", "read_yaml"]

# Values that a document has when its aliases are written out; ours: the largest recipe here has 200
LARGEST = 10_000


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter where it keeps silent."""

    def compose_document(self) -> yaml.Node | None:
        node = super().compose_document()
        if node is not None:
            _expanded_size(node, {})
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is there twice; remove one of them", problem_mark=key.start_mark
                )
            seen.add((key.tag, key.value))
        return node


# YAML 1.2's numbers with an exponent, such as 1e-5, which PyYAML's YAML 1.1 takes for text
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _expanded_size(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """The values in a node, aliases written out; each node is counted once and its size remembered."""
    known = sizes.get(id(node), 0)
    if known is None:
        raise yaml.composer.ComposerError(
            problem="an alias stands inside what it refers to; write the value out", problem_mark=node.start_mark
        )
    if known:
        return known
    sizes[id(node)] = None  # being counted
    size = 1
    if isinstance(node, yaml.SequenceNode):
        size += sum(_expanded_size(child, sizes) for child in node.value)
    elif isinstance(node, yaml.MappingNode):
        size += sum(_expanded_size(key, sizes) + _expanded_size(value, sizes) for key, value in node.value)
    if size > LARGEST:
        raise yaml.composer.ComposerError(
            problem=f"it has more than {LARGEST:,} values with its aliases written out; make it smaller",
            problem_mark=node.start_mark,
        )
    sizes[id(node)] = size
    return size


def read_yaml(content: str | bytes, name: str) -> Any:
    """Reads a YAML document.

    Args:
        content: The document; bytes may be in UTF-8 or, with its mark, UTF-16.
        name: What it is, for the message.

    Raises:
        ValueError: If it is no valid YAML, has a key twice or too many values; the message names line and column.
    """
    try:
        return yaml.load(content, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{name}{where} is not valid YAML: {error.problem or error.context}.") from error
    except RecursionError as error:
        raise ValueError(f"{name} is not valid YAML: its lists or mappings are nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # characters that are none; 2024-99-99 is no date
        raise ValueError(f"{name} is not valid YAML: {' '.join(str(error).split())}") from error


def load_settings(path: Path, hint: str = "write one pair a line") -> dict[str, Any]:
    """Reads a YAML file of settings.

    Args:
        path: The file.
        hint: How to mend a file that holds something else.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is a folder, no valid YAML, or does not hold settings by their names.
    """
    if path.is_dir():
        raise ValueError(f"config={path} is a folder; give the path of a YAML file in it.")
    settings = read_yaml(path.read_bytes(), f"config={path}")
    if not isinstance(settings, Mapping):
        raise ValueError(f"config={path} does not hold `name: value` pairs; {hint}.")
    for name in settings:
        if not isinstance(name, str):
            raise ValueError(f"config={path}: the key {name!r} is no name; write it in quotes, or correct it.")
    return dict(settings)
