"""Held-out answers of the task that was trained on, as an lm-eval task: their loss is the gain."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task
from transformers import PreTrainedTokenizerBase

from lopt_hf.common.sample_scores import RatioScores
from lopt_hf.common.settings import check_at_least
from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.loading import SplitError, load_sft_dataset

__all__ = ["ANSWER_METRIC", "HELDOUT_TASK", "NUM_HELDOUT", "answer_scores", "heldout_task", "load_heldout_rows"]

logger = logging.getLogger(__name__)

HELDOUT_TASK = "held-out answers"
ANSWER_METRIC = "log_likelihood,none"
NUM_HELDOUT = 64  # rows; ours


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
    return _AnswerTask(
        config={
            "task": HELDOUT_TASK,
            "custom_dataset": lambda **_: {"test": documents},
            "output_type": "loglikelihood",
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": "text",
            "doc_to_target": "answer",
            "process_results": _log_likelihood,
            "metric_list": [{"metric": "log_likelihood", "aggregation": "mean", "higher_is_better": True}],
            "metadata": {"version": 1},
        }
    )


def load_heldout_rows(source: str, count: int | None = None, split: str | None = None) -> list[Mapping[str, Any]]:
    """Loads the first rows of held-out data.

    Args:
        source: Hub id or local file, in any layout of `lopt-hf sft`.
        count: How many rows. Default: 64, or all if there are fewer.
        split: Which split of it. Default: `train`, the only one of a single file, with a warning if there are others.

    Raises:
        ValueError: If there is no such split, it has fewer rows than are asked for, or it does not hold prompts and
            completions as messages.
    """
    check_at_least("num_heldout", count, 1, "leaves nothing to measure")
    try:
        dataset = load_sft_dataset(source, split=split or "train")
    except SplitError as error:
        raise ValueError(f"{error} Name one that there is with --heldout-split.") from error
    known = list(dataset.info.splits or ())
    if split is None and len(known) > 1:
        logger.warning(
            "heldout_data=%s has the splits %s, and train is read: the gain may be of rows seen in training; name the "
            "one that is held out with --heldout-split.",
            source,
            ", ".join(known),
        )
    rows = list(to_trl_format(dataset).take(NUM_HELDOUT if count is None else count))
    if count is not None and len(rows) < count:
        raise ValueError(
            f"num_heldout={count}, but heldout_data={source} has only {len(rows)} rows; lower the one, or give more "
            "of the other."
        )
    if not rows[0].keys() >= {"prompt", "completion"} or isinstance(rows[0]["prompt"], str):
        raise ValueError(
            f"heldout_data={source} has the columns {sorted(rows[0])}; the loss of answers needs prompts and "
            "completions as messages, or one of the question-and-answer layouts of lopt-hf sft."
        )
    return rows


def answer_scores(log_likelihoods: Sequence[float], num_tokens: Sequence[int]) -> RatioScores:
    """The answers' mean loss in nats per token, resampleable.

    Args:
        log_likelihoods: One per answer, in nats.
        num_tokens: The answers' lengths.
    """
    return RatioScores(list(zip(log_likelihoods, num_tokens, strict=True)), np.negative)


class _AnswerTask(ConfigurableTask):
    """Asks for answers after prompts that are in the chat template already."""

    def construct_requests(self, doc: dict[str, Any], ctx: str | list[str], **kwargs: Any) -> list[Instance]:
        """The answer, and apart from it the white space that ends the prompt: lm-eval counts it to the answer.

        The prompt is the document's own, not `ctx`, which has what the settings add to other tasks' prompts.
        """
        continuations = [doc["space"] + doc["answer"], *([doc["space"]] if doc["space"] else [])]
        return [
            Instance("loglikelihood", doc, (doc["text"], continuation), index, metadata=kwargs["metadata"])
            for index, continuation in enumerate(continuations)
        ]


def _log_likelihood(doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """The log-likelihood of an answer in nats, without that of the white space before it."""
    with_space, *space = (log_likelihood for log_likelihood, _ in results)
    return {"log_likelihood": with_space - sum(space)}


def _document(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
    text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
    assert isinstance(whole, str) and isinstance(text, str)
    if not whole.startswith(text):
        raise ValueError(
            "the chat template does not render a prompt as the beginning of the prompt with its answer, so the answer "
            "cannot be told from it; leave held-out data out."
        )
    stripped = text.rstrip()
    space = text[len(stripped) :]
    whole_ids, text_ids, stripped_ids = (
        tokenizer(part, add_special_tokens=False)["input_ids"] for part in (whole, text, stripped)
    )
    if len(text_ids) == len(stripped_ids) or whole_ids[: len(text_ids)] != text_ids:  # the space is no token by itself
        text_ids, space = stripped_ids, ""
    return {
        "text": stripped,
        "space": space,
        "answer": whole[len(stripped) + len(space) :],
        "num_tokens": len(whole_ids) - len(text_ids),
    }
