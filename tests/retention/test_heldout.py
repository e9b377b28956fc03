"""The loss of held-out answers is that of `lopt_hf.common.evaluation`, whatever is done to other tasks' prompts."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lopt_hf.common.evaluation import answer_loss
from lopt_hf.retention.deltas import MARGIN, gain_delta, gain_scores
from lopt_hf.retention.evaluation import EvaluationSettings, evaluate_model
from lopt_hf.retention.heldout import HELDOUT_TASK, heldout_task, load_heldout_rows
from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.scores import ScoreCache, TaskScores
from lopt_hf.retention.suites import TaskEntry
from tests.retention.conftest import SavedModels, save
from tests.tiny import CHAT_TEMPLATE, make_model, make_tokenizer

NEW_LINE_TEMPLATE = CHAT_TEMPLATE.replace("A:", "A:\n")  # ChatML ends prompts so too
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {i} + {i}{' ?' * (i % 4)}"}],
        "completion": [{"role": "assistant", "content": f"[{i}, {2 * i}]" + " ok" * (i % 3)}],
    }
    for i in range(7)
]


def with_template(template: str) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def measured(
    model: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, cache: Path, **settings: Any
) -> dict[str, TaskScores]:
    entry = TaskEntry(HELDOUT_TASK, (heldout_task(rows, tokenizer),))
    return evaluate_model(ModelReference.find(model), [entry], EvaluationSettings(**settings), ScoreCache(cache))


def loss_of(model: str, rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> float:
    return answer_loss(AutoModelForCausalLM.from_pretrained(model).eval(), tokenizer, rows)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NEW_LINE_TEMPLATE], ids=["colon", "new line"])
@pytest.mark.parametrize(
    "settings", [{}, {"limit": 2}, {"num_fewshot": 3}, {"apply_chat_template": True}], ids=lambda value: str(value)
)
def test_the_loss_is_that_of_evaluation(
    models: SavedModels, tmp_path: Path, template: str, settings: dict[str, Any]
) -> None:
    """Of all rows; also if the prompt ends with white space, which lm-eval counts to the answer."""
    tokenizer = with_template(template)
    scores = measured(models.base, ROWS, tokenizer, tmp_path, **settings)
    assert len(scores[HELDOUT_TASK]) == len(ROWS)
    assert scores[HELDOUT_TASK].num_fewshot == 0
    assert gain_scores(scores).total == pytest.approx(loss_of(models.base, ROWS, tokenizer), abs=1e-4)


def test_white_space_that_is_part_of_a_token(models: SavedModels, tmp_path: Path) -> None:
    """Where a prompt's last space goes into the answer's first token, it is counted to the answer."""
    tokenizer = with_template(CHAT_TEMPLATE.replace("A:", "A: "))
    tokenizer.add_tokens([AddedToken(" [", normalized=False)])  # stands for a token such as " the"
    model = str(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(models.base).save_pretrained(model)
    tokenizer.save_pretrained(model)
    (document,) = heldout_task(ROWS[:1], tokenizer).dataset["test"].to_list()
    assert document == {"text": "U:What is 0 + 0\nA:", "space": "", "answer": " [0, 0]<eos>", "num_tokens": 7}
    scores = measured(model, ROWS, tokenizer, tmp_path)
    assert 0 < gain_scores(scores).total < 2 * math.log(tokenizer.vocab_size)


def test_unlikely_answers(tmp_path: Path) -> None:
    """Answers whose perplexity, as lm-eval computes it over whole answers, exceeds the largest number."""
    model, tokenizer = make_model(), make_tokenizer()
    with torch.no_grad():
        model.lm_head.weight *= 10
    rows = [{**ROWS[0], "completion": [{"role": "assistant", "content": "abc Zyx, " * 10}]}]
    folder = save(model, tmp_path / "model")
    scores = measured(folder, rows, tokenizer, tmp_path)
    (sample,) = scores[HELDOUT_TASK].samples
    loss = gain_scores(scores).total
    assert loss * sample["doc"]["num_tokens"] > math.log(sys.float_info.max)
    assert loss == pytest.approx(loss_of(folder, rows, tokenizer), abs=1e-4)


def test_the_gain_is_the_change_of_the_loss(models: SavedModels, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    before, after = (measured(model, ROWS, tokenizer, tmp_path) for model in (models.base, models.tuned))
    gain = gain_delta(before, [after], 0.95, MARGIN)
    assert gain is not None and not gain.higher_is_better
    assert gain.baseline == pytest.approx(loss_of(models.base, ROWS, tokenizer), abs=1e-4)
    assert gain.value == pytest.approx(loss_of(models.tuned, ROWS, tokenizer), abs=1e-4)
    assert gain.n == len(ROWS)
    assert gain_delta({}, [{}], 0.95, MARGIN) is None


@pytest.mark.parametrize(
    ("rows", "template", "message"),
    [
        ([], CHAT_TEMPLATE, "heldout data are empty"),
        (ROWS, None, "need a chat template"),
        (ROWS, "{% for m in messages|reverse %}{{ m['content'] }}{% endfor %}", "does not render a prompt as"),
    ],
)
def test_unusable_data(rows: list[dict[str, Any]], template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        heldout_task(rows, with_template(template))


def test_the_split_that_is_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where there is a choice and none was made: rows that were trained on are no held-out ones."""
    for split in ("train", "test"):
        row = {"question": f"a question of {split}", "answer": "an answer"}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    (row,) = load_heldout_rows(str(tmp_path))
    assert row["prompt"][0]["content"] == "a question of train"
    (record,) = caplog.records
    assert "has the splits train, test, and train is read" in record.getMessage()
    (row,) = load_heldout_rows(str(tmp_path), split="test")
    (alone,) = load_heldout_rows(str(tmp_path / "test.jsonl"), 1)
    assert row["prompt"][0]["content"] == alone["prompt"][0]["content"] == "a question of test"
    assert caplog.records == [record]
    with pytest.raises(ValueError, match="Unknown split .* Name one that there is with --heldout-split"):
        load_heldout_rows(str(tmp_path), 4, "dev")


def test_fewer_rows_than_are_asked_for(tmp_path: Path) -> None:
    """An error where the number was given; all there are where it was not."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": f"{i}"}) + "\n" for i in range(3)))
    assert len(load_heldout_rows(str(path))) == 3
    with pytest.raises(
        ValueError, match=r"num_heldout=4, but heldout_data=.*rows.jsonl has only 3 rows; lower the one"
    ):
        load_heldout_rows(str(path), 4)
