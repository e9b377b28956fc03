"""lm-eval tasks of every kind that the benchmark reads, for tiny models with a tokenizer of single characters."""

import json
from pathlib import Path

HEAD = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {examples}}}}}
test_split: test
fewshot_split: train
"""
CHOICES = """\
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metadata: {version: 1.0}
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
MORE_OF_CHOICES = """\
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}
  - {metric: acc_bytes, aggregation: !function aggregations.square_of_mean, higher_is_better: true}
"""
TEXTS = """\
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metadata: {version: 1.0}
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
ENDINGS = """\
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metadata: {version: 1.0}
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATED = """\
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 6}
metadata: {version: 1.0}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
filter_list:
  - {name: strict-match, filter: [{function: regex, regex_pattern: "^(.)"}, {function: take_first}]}
  - name: flexible-extract
    filter: [{function: regex, regex_pattern: "(.)", group_select: -1}, {function: take_first}]
"""
GROUP = """\
group: {name}
task: [sums, words]
aggregate_metric_list:
  - {{metric: acc, aggregation: mean, weight_by_size: {weighted}}}
  - {{metric: acc_norm, aggregation: mean, weight_by_size: {weighted}}}
"""
FILTERED_GROUP = """\
group: by_filter
task: [generated]
aggregate_metric_list: [{metric: exact_match, weight_by_size: true}]
"""
AGGREGATIONS = """\
def square_of_mean(items):
    return (sum(items) / len(items)) ** 2
"""
TASKS = ("sums", "words", "texts", "endings", "generated")
NUM_ROWS = {"sums": 12, "words": 5, "texts": 6, "endings": 7, "generated": 9}


def rows_of(name: str) -> list[dict[str, object]]:
    """The samples of a task, all different."""
    return [
        {
            "question": f"{name} {i} + {3 * i % 7}{' and so on' * (i % 3)}",
            "choices": [f"{i + 3 * i % 7}", f"{i}, or {i}", "no"],
            "answer": i % 3,
            "completion": "no",
        }
        for i in range(NUM_ROWS[name])
    ]


def write_rows(folder: Path, name: str, rows: list[dict[str, object]]) -> None:
    """Writes the samples of a task."""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_benchmark_tasks(folder: Path) -> Path:
    """Writes all tasks with their data.

    They are `sums` and `words` (multiple choice, `words` with fewer metrics), `texts` (perplexity of whole texts),
    `endings` (likelihood of an ending) and `generated` (generation, read by two filters), and of the first two the
    groups `even` and `sized`; `by_filter` is a group that leaves its filters to be found.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "aggregations.py").write_text(AGGREGATIONS, encoding="utf-8")
    examples = [{"question": f"so {i}", "choices": ["yes", "no"], "answer": 0, "completion": "."} for i in range(6)]
    write_rows_of_examples = folder / "examples.jsonl"
    write_rows_of_examples.write_text("".join(json.dumps(row) + "\n" for row in examples), encoding="utf-8")
    bodies = (CHOICES + MORE_OF_CHOICES, CHOICES, TEXTS, ENDINGS, GENERATED)
    for name, body in zip(TASKS, bodies, strict=True):
        write_rows(folder, name, rows_of(name))
        head = HEAD.format(name=name, data=folder / f"{name}.jsonl", examples=write_rows_of_examples)
        (folder / f"{name}.yaml").write_text(head + body, encoding="utf-8")
    for name, weighted in (("even", "false"), ("sized", "true")):
        (folder / f"{name}.yaml").write_text(GROUP.format(name=name, weighted=weighted), encoding="utf-8")
    (folder / "by_filter.yaml").write_text(FILTERED_GROUP, encoding="utf-8")
    return folder
