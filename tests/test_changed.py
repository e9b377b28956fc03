import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest

from tests.changed import ROOT, Sources, changed_files

FILES = {
    "lopt_hf/__init__.py": "_EXPORTS = {'Far': 'lopt_hf.far'}\n",
    "lopt_hf/cli.py": "import importlib\nimportlib.import_module(f'lopt_hf.scripts.{0}')\n",
    "lopt_hf/far.py": "def late():\n    from lopt_hf.near import thing\n",
    "lopt_hf/near.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import lopt_hf.scripts.run\n",
    "lopt_hf/tasks/__init__.py": "",
    "lopt_hf/tasks/load.py": "",
    "lopt_hf/scripts/run.py": "",
    "tests/far/conftest.py": "import tests.helpers\n",
    "tests/far/test_far.py": "from lopt_hf import Far\n",
    "tests/far/test_near.py": "import lopt_hf.near\n",
    "tests/helpers.py": "",
    "tests/test_load.py": "from lopt_hf.tasks import load\n",
    "tests/test_near.py": "from lopt_hf.near import thing\n",
    "tests/test_recipes.py": "FOLDER = 'recipes'\n",
    "tests/test_worker.py": "COMMAND = ['python', '-m', 'lopt_hf.cli']\n",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        # The test beside it in the tree, the other that imports it, and one that imports it through a lazy name.
        ("lopt_hf/near.py", ["tests/test_near.py", "tests/far/test_near.py", "tests/far/test_far.py"]),
        ("lopt_hf/far.py", ["tests/far/test_far.py"]),
        ("lopt_hf/scripts/run.py", ["tests/test_worker.py"]),  # only a type checker sees that `near` imports it
        ("tests/helpers.py", ["tests/far/test_far.py", "tests/far/test_near.py"]),
        ("tests/test_load.py", ["tests/test_load.py"]),
        ("lopt_hf/tasks/task.yaml", ["tests/test_load.py"]),
        ("lopt_hf/tasks/deleted.py", ["tests/test_load.py"]),
        ("recipes/deep/run.yaml", ["tests/test_recipes.py"]),
        ("LICENSE", []),
    ],
)
def test_what_a_change_concerns(checkout: Path, changed: str, tests: list[str]):
    assert Sources(checkout).tests([PurePosixPath(changed)]) == tests


def test_what_differs_from_a_branch(checkout: Path):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=name", "-c", "user.email=name@localhost"]
        subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True)

    git("init", "--initial-branch=main")
    git("add", ".")
    git("commit", "--message=first")
    git("checkout", "-b", "topic")
    (checkout / "lopt_hf" / "near.py").write_text("thing = 1\n")
    git("commit", "--all", "--message=second")
    git("mv", "tests/test_load.py", "tests/test_moved.py")
    (checkout / "new.txt").write_text("")
    names = ["lopt_hf/near.py", "new.txt", "tests/test_load.py", "tests/test_moved.py"]
    assert [str(path) for path in changed_files(checkout, "main")] == names
    assert [str(path) for path in changed_files(checkout, "HEAD")] == names[1:]


RUN = """
import sys
import pytest
sys.path.insert(0, {root!r})
from tests.changed import UntilTimeIsUp
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[UntilTimeIsUp(600)]))
"""
RINGS = "import signal\ndef test_rings(): signal.raise_signal(signal.SIGALRM)\ndef test_last(): pass\n"


@pytest.mark.parametrize(("first", "code"), [("assert True", 0), ("assert False", 1)])
def test_time_is_up_in_the_middle_of_a_test(tmp_path: Path, first: str, code: int):
    (tmp_path / "test_a.py").write_text(f"def test_first():\n    {first}\n")
    (tmp_path / "test_b.py").write_text(RINGS)
    command = [sys.executable, "-c", RUN.format(root=str(ROOT)), "test_a.py", "test_b.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code
    assert "600 s are over: 2 tests were left out" in done.stdout and "pytest test_b.py" in done.stdout
