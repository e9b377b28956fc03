"""`lopt-hf repl --judge`: full model, plain removal and folded model by tasks, speed and size."""

import json
import re
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt_hf.bench import repl_judge
from lopt_hf.bench.repl_judge import JudgeArguments
from lopt_hf.retention.cost import describe_device
from lopt_hf.retention.suites import SUITES
from lopt_hf.scripts import repl
from tests.repl.test_repl_command import HEALING, arguments, folder  # noqa: F401  # a fixture
from tests.retention.benchmark_tasks import write_benchmark_tasks

SPAN = {"num_layers_to_replace": None, "spans": "[[2, 4]]", "operator": "down_proj"}
JUDGE = {
    "judge": True,
    "judge_suite": "none",
    "judge_tasks": ["sums", "texts", "generated"],
    "judge_limit": 4,
    "judge_new_tokens": 3,
    "judge_rounds": 2,
}


def deltas(path):
    """The change of each model in each metric of each task."""
    report = json.loads(path.read_text())
    return {
        (model["label"], delta["task"], delta["metric"]): delta
        for model in report["models"]
        for delta in model["deltas"]
    }


def test_all_three_models_are_judged(folder, capsys):  # noqa: F811
    tasks = write_benchmark_tasks(folder / "tasks")
    healing = {**HEALING, "seeds": [0], "dataset_name": folder / "healing.txt"}
    repl.main(arguments(folder, **SPAN, **healing, **JUDGE, judge_include_path=tasks))
    printed = capsys.readouterr().out
    assert (folder / "out/judge.md").read_text() in printed + "\n" and f"Generated on: {describe_device()}" in printed
    against_full = deltas(folder / "out/judge/against-full/report.json")
    against_plain = deltas(folder / "out/judge/against-plain/report.json")
    assert {task for _, task, _ in against_full} == {"sums", "texts", "generated"}
    assert any("exact_match" in metric for _, _, metric in against_full)
    for (label, task, metric), delta in against_plain.items():
        assert label == "folded"
        folded, plain = (against_full[name, task, metric] for name in ("folded", "plain removal"))
        assert (delta["baseline"], delta["value"]) == (plain["value"], folded["value"])
    weighed = {each["name"]: each for each in json.loads((folder / "out/judge.json").read_text())["models"]}
    for name, place in (("full model", "model"), ("plain removal", "out/plain"), ("folded", "out/folded")):
        model = AutoModelForCausalLM.from_pretrained(folder / place)
        assert weighed[name]["weight_bytes"] == 4 * model.num_parameters()
        assert len(weighed[name]["seconds"]) == 2 and weighed[name]["speedup"] > 0
        assert re.search(rf"\| {name} +\|", printed)


def test_models_are_timed_where_they_are_asked(folder, monkeypatch):  # noqa: F811
    for place in repl_judge.FOLDERS.values():
        shutil.copytree(folder / "model", folder / place)
    used = []

    def time_nothing(models, prompts_BT, *how):
        used.extend([prompts_BT.device.type, *(model.device.type for model in models)])
        return [1.0], [1.0]

    monkeypatch.setattr(repl_judge, "time_generation", time_nothing)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **how: torch.device("meta"))
    repl_judge._weigh(JudgeArguments(judge=True), str(folder / "model"), folder, "float32")
    assert used == 6 * ["meta"]


def test_suites_are_those_of_retention():
    known = JudgeArguments.__dataclass_fields__["judge_suite"].metadata["choices"]
    assert set(known) <= {*SUITES, "none"} and "offline" in known


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"judge_limit": 4}, "judge_limit=4 has no effect without judge"),
        ({"judge": True, "judge_suite": "none"}, "judge_suite='none' without judge_tasks asks nothing"),
        ({"judge": True, "judge_rounds": 0}, "judge_rounds=0"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        JudgeArguments(**settings)


def test_tasks_are_found_before_a_model_is_loaded(folder, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(repl, "Comparison", None)
    with pytest.raises(SystemExit) as ended:
        repl.main(arguments(folder, **SPAN, judge=True, judge_tasks=["offline_nowledge"]))
    assert (
        "task 'offline_nowledge' is unknown; nearest are offline_knowledge"
        in f"{ended.value}{capsys.readouterr().err}"
    )
