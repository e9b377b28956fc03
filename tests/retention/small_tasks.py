"""lm-eval tasks of a few short samples, for tiny models with a tokenizer of single characters."""

import json
from pathlib import Path

SUMS = """\
task: tiny_sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
TEXT = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
metadata: {{version: 1.0}}
"""


def write_tasks(folder: Path, number: int = 12) -> Path:
    """Writes `tiny_sums` (multiple choice) and `tiny_text` (perplexity) with their data; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "sums.jsonl"
    rows = [
        {"question": f"What is {i} + {3 * i % 7}", "choices": [str(i + 3 * i % 7), str(i), "no"], "answer": 0}
        for i in range(number)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "tiny_sums.yaml").write_text(SUMS.format(data=data), encoding="utf-8")
    (folder / "tiny_text.yaml").write_text(TEXT.format(data=data), encoding="utf-8")
    return folder
