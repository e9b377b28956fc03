"""The notebooks as they are kept: run from top to bottom, with a figure each, and nothing of the machine they ran on.

That they run is what `notebooks/execute.py` checks.
"""

import ast
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
STANDARD = {"copy", "math", "os", "pathlib", "tempfile"}
LIBRARIES = {"IPython", "accelerate", "datasets", "lopt_hf", "matplotlib", "torch", "transformers", "trl"}
MACHINE = re.compile(r"/(root|home|tmp|opt|usr|Users|var)/|\x1b\[|Traceback|Warning")


def read(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def code_of(cells: list[dict]) -> list[dict]:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def outputs_of(cells: list[dict]) -> list[dict]:
    return [output for cell in code_of(cells) for output in cell["outputs"]]


def test_there_are_six():
    assert [path.name[0] for path in NOTEBOOKS] == list("123456")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_ran_from_top_to_bottom(self, path):
        cells = code_of(read(path))
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))

    def test_shows_a_figure(self, path):
        assert any("image/png" in output.get("data", {}) for output in outputs_of(read(path)))

    def test_outputs_are_clean(self, path):
        for output in outputs_of(read(path)):
            assert output["output_type"] != "error" and output.get("name") != "stderr"
            texts = [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
            text = "".join(part for value in [output.get("text", ""), *texts] for part in value)
            assert not MACHINE.search(text) and "<progress" not in text, text

    def test_imports_public_names_of_few_libraries(self, path):
        source = "\n".join("".join(cell["source"]) for cell in code_of(read(path)))
        tree = ast.parse(re.sub(r"^%.*$", "", source, flags=re.MULTILINE))
        assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in modules} <= STANDARD | LIBRARIES
            if isinstance(node, ast.ImportFrom | ast.Attribute):
                names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else [node.attr]
                assert not any(re.match("_[^_]", name) for name in names)

    def test_says_what_it_shows_and_is_listed(self, path):
        first = read(path)[0]
        title, _, rest = "".join(first["source"]).partition("\n")
        assert first["cell_type"] == "markdown" and title.startswith(f"# {path.name[0]}. ") and rest.strip()
        assert f"({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")

    def test_opens_in_colab_and_installs_the_package_where_it_is_missing(self, path):
        cells = read(path)
        assert f"blob/main/notebooks/{path.name})" in "".join(cells[0]["source"])
        first = code_of(cells)[0]["source"][0]
        assert first == '%sx python -c "import lopt_hf" || pip install -q "lopt_hf[demo]"\n'


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_imports_of_the_package_is_there(path):
    """Found here in seconds, and not where the notebooks are executed."""
    lines = "".join("".join(cell["source"]) + "\n" for cell in code_of(read(path))).splitlines()
    program = "\n".join(line for line in lines if not line.startswith(("%", "!")))
    imports = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.ImportFrom)]
    ours = [ast.unparse(node) for node in imports if str(node.module).startswith("lopt_hf")]
    assert ours
    exec("\n".join(ours), {})
