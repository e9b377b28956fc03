"""How the package is laid out: which room may import which, no circles, no text that stands twice.

The imports are read from the source, those inside functions and for type checkers too.
"""

import ast
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import lopt_hf

PACKAGE = Path(lopt_hf.__file__).parent
# From top to bottom. A module may import what is in its own room and in the layers below it; two rooms of one layer do
# not know each other. A sub-package is a room of its own where it is named here.
LAYERS = (
    {"cli", "scripts"},
    {"planner", "compare", "bench"},
    {"retention.report", "pipeline.simulator"},
    {"retention", "pipeline.runtime"},
    {"pipeline.split"},
    {"pipeline"},
    {"trainers", "repl", "peers"},
    {"local"},
    {"meters", "data"},
    {"common"},
)
# Modules beside the rooms: old public names of what has moved, and GRPO's rewards, which users name by their path.
BESIDE = {"blocks", "objectives", "rewards"}
MOST_BASES = 3
IDENTICAL_LINES = 10  # so many make a repetition

Graph = dict[str, set[str]]


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """The dotted name of a file relative to the package, such as `local.blocks`; of `__init__.py` the folder's."""
    return ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")


def imported_names(source: str, module: str, is_package: bool) -> set[str]:
    """All dotted names that a module imports, relative to the package; of `from a import b` both `a` and `a.b`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = node.module or ""
            if node.level:
                parts = f"lopt_hf.{module}".split(".")
                start = ".".join([*parts[: len(parts) - node.level + is_package], *([start] if start else [])])
            names |= {start, *(f"{start}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("lopt_hf.") for name in names if name.startswith("lopt_hf.")}


def read_graph(package: Path = PACKAGE) -> Graph:
    """Each module with the modules that it imports."""
    files = {module_name(path, package): path for path in package.rglob("*.py")}
    del files[""]  # the public names, loaded lazily
    graph = {}
    for module, path in files.items():
        names = imported_names(path.read_text(encoding="utf-8"), module, path.name == "__init__.py")
        graph[module] = (names & files.keys()) - {module}
    return graph


def room_of(module: str) -> str | None:
    """The room that a module is in: the longest one that its name starts with."""
    rooms = [room for layer in LAYERS for room in layer if f"{module}.".startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def layer_of(room: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if room in layer)


def arrows_upwards(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The imports of a room in a layer that is not below the importing one."""
    wrong = []
    for module, imported in graph.items():
        for other in imported:
            room, other_room = room_of(module), room_of(other)
            if room is None or other_room is None or room == other_room:
                continue
            if layer_of(other_room) <= layer_of(room):
                wrong.append(f"{module} -> {other}")
    return sorted(wrong)


def circle_in(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """Nodes that lead to each other, in order; empty if there are none."""
    path: list[str] = []
    done: set[str] = set()

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next((found for node in sorted(graph) if (found := visit(node))), [])


def between_rooms(graph: Mapping[str, Iterable[str]]) -> Graph:
    rooms: Graph = defaultdict(set)
    for module, imported in graph.items():
        for other in imported:
            if room_of(module) != room_of(other):
                rooms[str(room_of(module))].add(str(room_of(other)))
    return rooms


def repeated_runs(texts: Mapping[str, str], length: int = IDENTICAL_LINES) -> list[str]:
    """Where a run of as many lines stands a second time; blank lines and indentation do not count."""
    first: dict[tuple[str, ...], str] = {}
    found = []
    for name, text in texts.items():
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        for start in range(len(lines) - length + 1):
            run = tuple(line for _, line in lines[start : start + length])
            place = f"{name}:{lines[start][0]}"
            if run in first:
                found.append(f"{first[run]} and {place}")
            first.setdefault(run, place)
    return found


def test_every_module_has_its_room():
    assert sorted(module for module in read_graph() if room_of(module) is None) == sorted(BESIDE)
    assert [room for layer in LAYERS for room in layer if not list(PACKAGE.glob(room.replace(".", "/") + "*"))] == []


def test_imports_point_down():
    assert arrows_upwards(read_graph()) == []


def test_no_imports_go_in_a_circle():
    assert circle_in(read_graph()) == []
    assert circle_in(between_rooms(read_graph())) == []


def test_no_lines_stand_twice():
    texts = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    assert repeated_runs(texts) == []


def test_trainers_have_few_bases():
    names = [name for name in lopt_hf.__all__ if name.endswith("Trainer")]
    trainers = [getattr(lopt_hf, name) for name in names]
    bases = {
        trainer.__name__: [base.__name__ for base in trainer.__mro__[1:] if base.__module__.startswith("lopt_hf.")]
        for trainer in trainers
    }
    assert len(bases) >= 6
    assert {name: of_ours for name, of_ours in bases.items() if len(of_ours) > MOST_BASES} == {}


class TestTheChecksThemselves:
    def test_imports_are_found_wherever_they_are(self):
        source = (
            "from typing import TYPE_CHECKING\nimport lopt_hf.data.formats\nfrom .boundary import GradientBoundary\n"
            "if TYPE_CHECKING:\n    from lopt_hf.bench import step\n"
            "def run():\n    from ..repl.model import RepLModel\n"
        )
        names = imported_names(source, "local.blocks", is_package=False)
        assert {"data.formats", "local.boundary", "bench.step", "repl.model"} <= names

    def test_an_arrow_upwards_is_found(self):
        graph = {"local.blocks": {"trainers.checks"}, "trainers.checks": {"local.readout", "trainers.reference"}}
        assert arrows_upwards(graph) == ["local.blocks -> trainers.checks"]

    def test_siblings_do_not_import_each_other(self):
        assert arrows_upwards({"planner.plan": {"bench.step"}}) == ["planner.plan -> bench.step"]

    def test_a_circle_is_found(self):
        assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
        assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []

    def test_a_run_that_stands_twice_is_found(self):
        lines = [f"line {number}" for number in range(IDENTICAL_LINES)]
        other = ["other", *(f"    {line}\n" for line in lines)]
        assert repeated_runs({"a": "\n".join(lines), "b": "\n".join(other)}) == ["a:1 and b:2"]
        assert repeated_runs({"a": "\n".join(lines), "b": "\n".join(other[:-1])}) == []
