"""Tasks whose answers are written: GSM8K's own questions, and IFEval's own checks; a paired test of each."""

import json
from pathlib import Path
from typing import Any

import pytest

from lopt_hf.retention.benchmark import Candidate, RetentionBenchmark
from lopt_hf.retention.evaluation import EvaluationSettings
from lopt_hf.retention.results import Delta
from lopt_hf.retention.scores import ScoreCache
from lopt_hf.retention.suites import SUITES, SuiteTask, load_entries
from tests.retention.conftest import SavedModels

# lm-eval's own task but for its documents, which are on the hub, and shorter answers
IFEVAL = """\
task: own_ifeval
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
num_fewshot: 0
doc_to_text: prompt
doc_to_target: 0
generation_kwargs: {{until: [], do_sample: false, temperature: 0.0, max_gen_toks: 24}}
process_results: !function ifeval.process_results
metric_list:
  - {{metric: prompt_level_strict_acc, aggregation: mean, higher_is_better: true}}
  - {{metric: inst_level_strict_acc, aggregation: !function ifeval.agg_inst_level_acc, higher_is_better: true}}
  - {{metric: prompt_level_loose_acc, aggregation: mean, higher_is_better: true}}
  - {{metric: inst_level_loose_acc, aggregation: !function ifeval.agg_inst_level_acc, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
INSTRUCTIONS: list[tuple[str, dict[str, Any]]] = [
    ("punctuation:no_comma", {}),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 4}),
    ("startend:quotation", {}),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 1, "let_relation": "at least"}),
]


def compared(
    models: SavedModels, task: str, folder: Path, cache: Path, **settings: Any
) -> tuple[RetentionBenchmark, dict[str, Delta]]:
    entries = load_entries([SuiteTask(task)], [folder])
    benchmark = RetentionBenchmark(models.base, entries, EvaluationSettings(**settings), ScoreCache(cache))
    report = benchmark.compare([Candidate("tuned", "tuned", (models.tuned,))], with_drift=False)
    assert report is not None
    return benchmark, {delta.metric: delta for delta in report.models[0].deltas}


def test_gsm8k(models: SavedModels, shared: Path, tmp_path: Path) -> None:
    """A tiny model's numbers are wrong, but they are read out of its texts and counted."""
    folder = shared / "lm_eval_tasks"
    benchmark, deltas = compared(models, "local_gsm8k", folder, tmp_path, limit=6, batch_size=6, max_length=256)
    (delta,) = deltas.values()
    assert delta.metric.startswith("exact_match") and delta.n == 6
    assert delta.p_value is not None and delta.right_to_wrong is not None
    questions = [json.loads(line)["question"] for line in (shared / "data/gsm8k_test.jsonl").open(encoding="utf-8")]
    samples = benchmark.scores(models.base)["local_gsm8k"].samples
    assert [sample["doc"]["question"] for sample in samples] == questions[:6]


@pytest.mark.slow  # importing its checks asks for NLTK's data, which takes as long as no network takes to answer
def test_ifeval(models: SavedModels, tmp_path: Path) -> None:
    """Prompts are right or wrong, and have McNemar's test; instructions, several in each, are resampled by prompt."""
    checks = pytest.importorskip("lm_eval.tasks.ifeval.utils")
    rows = []
    for number in range(12):
        chosen = [INSTRUCTIONS[(number + step) % 4] for step in range(1 + number % 3)]
        names, options = [name for name, _ in chosen], [options for _, options in chosen]
        rows.append({"key": number, "prompt": f"Say {number}.", "instruction_id_list": names, "kwargs": options})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ifeval.py").write_text("from lm_eval.tasks.ifeval.utils import agg_inst_level_acc, process_results\n")
    (tmp_path / "own_ifeval.yaml").write_text(IFEVAL.format(data=tmp_path / "rows.jsonl"))
    benchmark, deltas = compared(models, "own_ifeval", tmp_path, tmp_path / "cache", batch_size=5)
    prompts, instructions = deltas["prompt_level_strict_acc"], deltas["inst_level_strict_acc"]
    assert prompts.n == instructions.n == 12
    assert prompts.p_value is not None and instructions.p_value is None
    assert 0 < instructions.baseline < 1
    scores = benchmark.scores(models.base)["own_ifeval"]
    for sample, is_right in zip(scores.samples, scores.metrics["prompt_level_strict_acc,none"], strict=True):
        found = checks.process_results(sample["doc"], sample["responses"]["none"])
        assert found["prompt_level_strict_acc"] == is_right


def test_the_suite_is_the_papers_two() -> None:
    assert set(SUITES["generation"]) == {task for task in SUITES["paper"] if task.name in ("gsm8k", "ifeval")}
