"""Runs the tests that a change may break: those that import what changed, the nearest first, as many as fit a time.

```bash
python tests/changed.py                 # what differs from main, committed or not
python tests/changed.py --base HEAD     # what is not committed
python tests/changed.py --list          # say which tests, run none
```

What changed is compared with the commit where this branch left main. Which tests that concerns is read off the import
statements, without importing anything: a test that imports the changed module stands before one that imports a module
that imports it. A changed file that is no module concerns the modules beside it, and those with a string that names it
or its first folder, such as "recipes".
"""

import argparse
import ast
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import resolve_name
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("lopt_hf", "tests")
SECONDS = 80  # what two minutes leave when imports, types and lint are taken off


class Sources:
    """The modules of a checkout, and which of them each imports.

    Args:
        root: The checkout.
    """

    def __init__(self, root: Path) -> None:
        paths = [path.relative_to(root) for folder in FOLDERS for path in sorted((root / folder).rglob("*.py"))]
        self.paths = {_module_name(path): path for path in paths}
        self.trees = {name: ast.parse((root / path).read_text("utf-8")) for name, path in self.paths.items()}
        self.lazy = {name: dict(_lazy_names(tree)) for name, tree in self.trees.items()}
        self.imports = {name: set(self._imports(name)) - {name} for name in self.paths}
        for name, path in self.paths.items():  # pytest loads the conftest of a test's folder and of those above
            if path.name.startswith("test_"):
                folders = (_module_name(parent / "conftest.py") for parent in path.parents)
                self.imports[name] |= {folder for folder in folders if folder in self.paths}

    def _imports(self, name: str) -> Iterator[str]:
        package = name if self.paths[name].name == "__init__.py" else name.rpartition(".")[0]
        for node in _executed(self.trees[name]):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield from self._known(alias.name)
            elif isinstance(node, ast.ImportFrom):
                module = resolve_name("." * node.level + (node.module or ""), package)
                for alias in node.names:
                    yield from self._known(self.lazy.get(module, {}).get(alias.name, f"{module}.{alias.name}"))
            elif isinstance(node, ast.Constant) and node.value in self.paths and not self.lazy[name]:
                yield node.value  # `python -m module`
            elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                start = str(node.values[0].value)  # f"package.{name}"
                yield from (module for module in self.paths if "." in start and module.startswith(start))

    def _known(self, dotted: str) -> Iterator[str]:
        """The modules that run when a name is imported: its own and the packages above."""
        while dotted:
            if dotted in self.paths:
                yield dotted
            dotted = dotted.rpartition(".")[0]

    def concerned(self, changed: Iterable[PurePosixPath]) -> dict[str, int]:
        """How many imports each module is away from a changed file; those that it does not concern are left out."""
        importers: dict[str, list[str]] = {}
        for name, imported in self.imports.items():
            for other in imported:
                importers.setdefault(other, []).append(name)
        distance = {name: 0 for path in changed for name in self._modules_of(path)}
        queue = deque(distance)
        while queue:
            name = queue.popleft()
            for importer in importers.get(name, ()):
                if importer not in distance:
                    distance[importer] = distance[name] + 1
                    queue.append(importer)
        return distance

    def _modules_of(self, path: PurePosixPath) -> Iterator[str]:
        if path.suffix == ".py" and path.parts[0] in FOLDERS:
            # One that was deleted concerns its package, besides those whose import statements have been mended.
            yield from list(self._known(_module_name(path)))[:1]
            return
        for name, tree in self.trees.items():
            if self.paths[name].parent == Path(path.parent) or _names(tree, path):
                yield name

    def tests(self, changed: Sequence[PurePosixPath]) -> list[str]:
        """The test files that a change concerns, the nearest first."""
        distance = self.concerned(changed)
        folders = {path.parts[1:-1] for path in changed}
        found = [name for name in distance if self.paths[name].name.startswith("test_")]
        # Of equally near ones, those in the folder that mirrors the changed one come first.
        found.sort(key=lambda name: (distance[name], self.paths[name].parts[1:-1] not in folders, name))
        return [self.paths[name].as_posix() for name in found]


def _module_name(path: PurePosixPath | Path) -> str:
    return ".".join(path.parent.parts if path.name == "__init__.py" else path.with_suffix("").parts)


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            yield node
            yield from _executed(node)


def _lazy_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """The public names of a package that are loaded on first use, `_EXPORTS`, with full names."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_EXPORTS":
            exports: Mapping[str, str] = ast.literal_eval(node.value)
            yield from ((name, f"{module}.{name}") for name, module in exports.items())


def _names(tree: ast.Module, path: PurePosixPath) -> bool:
    """Whether a module has a string that names a file or its first folder."""
    strings = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    named = {path.name, path.parts[0]} - set(FOLDERS)
    return any(named & set(PurePosixPath(text).parts) for text in strings)


def changed_files(root: Path, base: str) -> list[PurePosixPath]:
    """The files that differ from the commit where this branch left `base`, and those that git does not know yet."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    left = git("merge-base", "HEAD", base)[0]
    names = git("diff", "--name-only", "--no-renames", left) + git("ls-files", "--others", "--exclude-standard")
    return sorted({PurePosixPath(name) for name in names if name})


class UntilTimeIsUp:
    """A pytest plugin that ends the run after some seconds, in the middle of a test if need be, and says what is left.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self.session: Any = None
        self.left: dict[str, str] = {}  # file by test
        self.is_over = False
        signal.signal(signal.SIGALRM, self._end)
        signal.alarm(seconds)

    def _end(self, *_: Any) -> None:
        self.is_over = True
        pytest.exit("time is up", returncode=int(self.session is not None and self.session.testsfailed > 0))

    def pytest_collection_finish(self, session: Any) -> None:
        self.session = session
        self.left = {item.nodeid: item.location[0] for item in session.items}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.left.pop(nodeid, None)

    def pytest_sessionfinish(self) -> None:
        signal.alarm(0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.is_over:
            files = " ".join(dict.fromkeys(self.left.values()))
            terminalreporter.section(f"{self.seconds} s are over: {len(self.left)} tests were left out")
            terminalreporter.write_line(f"pytest {files}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="main", help="branch to compare with (default: %(default)s)")
    parser.add_argument("--seconds", type=int, default=SECONDS, help="time for the tests (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the test files, nearest first, and stop")
    options = parser.parse_args()
    changed = changed_files(ROOT, options.base)
    tests = Sources(ROOT).tests(changed)
    print(f"{len(changed)} files differ from {options.base}; test files that they concern: {len(tests)}", flush=True)
    if options.list or not tests:
        print("\n".join(tests))
        return 0
    code = pytest.main(["-q", "--rootdir", str(ROOT), *tests], plugins=[UntilTimeIsUp(options.seconds)])
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else int(code)


if __name__ == "__main__":
    sys.exit(main())
