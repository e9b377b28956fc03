"""The code of a user's own task is part of what it asks; that of libraries is not."""

import os
import sys
from pathlib import Path

import pytest

from lopt_hf.retention import own_code as own_code_module
from lopt_hf.retention.evaluation_settings import EvaluationSettings
from lopt_hf.retention.identity import task_identity
from lopt_hf.retention.own_code import own_code
from lopt_hf.retention.suites import SuiteTask, load_entries
from tests.retention.benchmark_tasks import write_benchmark_tasks

CODE = {
    "scoring.py": """\
def process_results(doc, results):
    return {"acc": score(results)}

def score(results):
    return float(len(results))
""",
    "filters.py": """\
from lm_eval.api.filter import Filter

class First(Filter):
    def apply(self, resps, docs):
        return [each[0] for each in resps]
""",
    "examples.py": """\
from functools import partial

def text(prefix, doc):
    return prefix + doc["question"]

doc_to_text = partial(text, "Q: ")
""",
    "tasks.py": """\
from lm_eval.api.task import ConfigurableTask

class Task(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={name: value for name, value in config.items() if name != "class"})

    def doc_to_text(self, doc):
        return doc["question"]
""",
}
BY_FUNCTION = """\
process_results: !function scoring.process_results
filter_list: [{name: none, filter: [{function: !function filters.First}]}]
fewshot_config: {doc_to_text: !function examples.doc_to_text}
"""


def identity_of(name: str, folder: Path) -> dict[str, object]:
    (entry,) = load_entries([SuiteTask(name)], [folder])
    return task_identity(entry.tasks[0], None, EvaluationSettings())


@pytest.mark.parametrize(
    ("edited", "old", "new"),
    [
        ("scoring.py", "float(len(results))", "0.5"),
        ("filters.py", "each[0]", "each[-1]"),
        ("examples.py", "prefix + doc", "doc"),
        ("tasks.py", 'doc["question"]', '"?"'),
    ],
    ids=["a helper", "a filter", "a part of a partial", "a class"],
)
def test_an_edit_makes_it_another_task(tmp_path: Path, edited: str, old: str, new: str) -> None:
    """Of code that the text of the configuration does not show."""
    folder = write_benchmark_tasks(tmp_path / "tasks")
    for name, text in CODE.items():
        (folder / name).write_text(text)
    task = "words" if edited == "tasks.py" else "generated"
    added = "class: !function tasks.Task\n" if edited == "tasks.py" else BY_FUNCTION
    of_task = folder / f"{task}.yaml"
    of_task.write_text(of_task.read_text().partition("filter_list")[0] + added)
    before = identity_of(task, folder)
    os.utime(folder / edited, (1, 1))  # lm-eval loads it again
    assert identity_of(task, folder) == before
    (folder / edited).write_text(CODE[edited].replace(old, new))
    after = identity_of(task, folder)
    assert {name for name in before if before[name] != after[name]} == {"code"}


IMPORTS = {
    "by name": "from scoring_of_mine import score as of_mine",
    "as a module": "import scoring_of_mine",
    "a constant": "from scoring_of_mine import UNUSED",
    "inside a function": "def later():\n    import scoring_of_mine",
    "through another": "import between_mine",
    "of a package": "from package_of_mine import between",
}


@pytest.mark.parametrize("imported", IMPORTS.values(), ids=IMPORTS)
def test_an_edited_helper_makes_it_another_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, imported: str
) -> None:
    """The file that the configuration names stays as it was; what is only beside it does not count."""
    folder = write_benchmark_tasks(tmp_path / "tasks")
    helpers = tmp_path / "helpers"
    (helpers / "package_of_mine").mkdir(parents=True)
    monkeypatch.syspath_prepend(helpers)
    for name in [name for name in sys.modules if name.partition(".")[0].endswith("_mine")]:
        monkeypatch.delitem(sys.modules, name)  # of another test's folder
    (helpers / "between_mine.py").write_text("import numpy, torch\nfrom scoring_of_mine import UNUSED\n")
    (helpers / "package_of_mine" / "__init__.py").write_text("")
    (helpers / "package_of_mine" / "between.py").write_text("from . import scoring\nimport between_mine\n")
    (helpers / "package_of_mine" / "scoring.py").write_text("from lopt_hf.retention import scores\n")
    (helpers / "scoring_of_mine.py").write_text("UNUSED = 0\ndef score(results): return 0.0\n")
    (folder / "filters.py").write_text(CODE["filters.py"])
    (folder / "examples.py").write_text(CODE["examples.py"])
    (folder / "scoring.py").write_text(f"{imported}\n{CODE['scoring.py']}")
    of_task = folder / "generated.yaml"
    of_task.write_text(of_task.read_text().partition("filter_list")[0] + BY_FUNCTION)
    before = identity_of("generated", folder)
    (folder / "aggregations.py").write_text("")
    assert identity_of("generated", folder) == before
    edited = "package_of_mine/scoring.py" if "package" in imported else "scoring_of_mine.py"
    with (helpers / edited).open("a") as file:
        file.write("# edited\n")
    after = identity_of("generated", folder)
    assert {name for name in before if before[name] != after[name]} == {"code"}


def test_data_that_the_code_may_read_make_it_another_task(tmp_path: Path) -> None:
    """Small files of data beside it; not what it does not read as such, and not what is too large."""
    folder = write_benchmark_tasks(tmp_path / "tasks")
    (folder / "scoring.py").write_text(CODE["scoring.py"])
    (folder / "filters.py").write_text(CODE["filters.py"])
    (folder / "examples.py").write_text(CODE["examples.py"])
    of_task = folder / "generated.yaml"
    of_task.write_text(of_task.read_text().partition("filter_list")[0] + BY_FUNCTION)
    (folder / "weights.json").write_text("[1]")
    before = identity_of("generated", folder)
    (folder / "train.log").write_text("begun")
    (folder / "runs").mkdir()
    (folder / "runs" / "scores.json").write_text("[]")
    assert identity_of("generated", folder) == before
    (folder / "weights.json").write_text("[2]")
    after = identity_of("generated", folder)
    assert {name for name in before if before[name] != after[name]} == {"code"}
    (folder / "large.json").write_text("[3]" + " " * own_code_module.MAX_DATA_BYTES)
    assert identity_of("generated", folder) == after


def test_other_tasks_are_identified_as_before(tmp_path: Path) -> None:
    """Those of lm-eval and of the package, whatever functions they name, and a user's without code."""
    folder = write_benchmark_tasks(tmp_path / "tasks")
    sums = folder / "sums.yaml"
    sums.write_text(sums.read_text().replace("aggregations.square_of_mean", "lm_eval.api.metrics.mean"))
    names = ["words", "sums", "offline_knowledge", "offline_prose"]
    for (task,) in (entry.tasks for entry in load_entries([SuiteTask(name) for name in names], [folder])):
        assert own_code(task) is None
        assert "code" not in task_identity(task, None, EvaluationSettings(limit=2))
