"""The gain beside the loss: held-out answers of the task that was trained on, as an lm-eval task."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task
from transformers import PreTrainedTokenizerBase

from lopt_hf.retention.statistics import RatioScores

__all__ = ["HELDOUT_TASK", "answer_scores", "heldout_task"]

HELDOUT_TASK = "held-out answers"


def heldout_task(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> Task:
    """Makes a task that asks for the likelihood of given answers.

    Args:
        rows: Rows with `prompt` and `completion`, each a list of messages.
        tokenizer: The baseline's, with a chat template; it also counts the answers' tokens.

    Raises:
        ValueError: If there are no rows, or the tokenizer has no chat template.
    """
    if not rows:
        raise ValueError("heldout data are empty; give at least one row.")
    if not tokenizer.chat_template:
        raise ValueError(
            "heldout data need a chat template, and the baseline's tokenizer has none; leave them out, or add one."
        )
    documents = Dataset.from_list([_document(row, tokenizer) for row in rows])
    return ConfigurableTask(
        config={
            "task": HELDOUT_TASK,
            "custom_dataset": lambda **_: {"test": documents},
            "output_type": "loglikelihood",
            "test_split": "test",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "perplexity"}],
            "metadata": {"version": 1},
        }
    )


def answer_scores(log_likelihoods: Sequence[float], num_tokens: Sequence[int]) -> RatioScores:
    """The answers' mean loss in nats per token, resampleable.

    Args:
        log_likelihoods: One per answer, in nats.
        num_tokens: The answers' lengths.
    """
    return RatioScores(list(zip(log_likelihoods, num_tokens, strict=True)), np.negative)


def _document(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    assert isinstance(whole, str) and isinstance(text, str)
    if not whole.startswith(text):
        raise ValueError(
            "the chat template does not render a prompt as the beginning of the prompt with its answer, so the answer "
            "cannot be told from it; leave held-out data out."
        )
    num_tokens = len(tokenizer(whole, add_special_tokens=False)["input_ids"]) - len(
        tokenizer(text, add_special_tokens=False)["input_ids"]
    )
    return {"text": text, "answer": whole[len(text) :], "num_tokens": num_tokens}
