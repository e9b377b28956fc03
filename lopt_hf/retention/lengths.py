"""Prompts and answers that do not fit into a model: they are told, or refused, before the model is asked.

lm-eval cuts the beginning off a prompt that is too long and says so in its log only; of other things that do not fit
it makes an assertion.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from lopt_hf.retention.references import ModelReference
from lopt_hf.retention.weights import auto_class_of

__all__ = [
    "check_answers",
    "check_max_length",
    "check_written",
    "count_tokens",
    "listed",
    "tell_cut_prompts",
    "written_tokens",
]

logger = logging.get_logger(__name__)

LIMITS = ("n_positions", "max_position_embeddings", "n_ctx")  # of a configuration, as lm-eval looks for them
OF_POSITIONS = ("pos", "wpe")  # in the names of tables with an entry for each position
SPARE_POSITIONS = 2  # such as OPT's table has besides

NAMED = 3  # tasks in a line; MMLU has 57


def count_tokens(requests: Sequence[Instance], language_model: HFLM) -> list[int]:
    """Returns the tokens of each request's text, without those that a tokenizer adds."""
    texts = ["".join(part for part in request.args if isinstance(part, str)) for request in requests]
    return [len(ids) for ids in language_model.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def written_tokens(request: Instance, language_model: HFLM) -> int:
    """Returns how many tokens a model may write in answer to a request; 0 for likelihoods."""
    if request.request_type != "generate_until":
        return 0
    return normalize_gen_kwargs(request.args[1], language_model.max_gen_toks)["max_gen_toks"]


def check_max_length(reference: ModelReference, max_length: int | None) -> None:
    """Checks by a model's configuration that it can read as many tokens as are asked for.

    A model that turns positions into angles reads on beyond what it was trained for, which is told; one that has a
    table of positions cannot.

    Args:
        reference: The model.
        max_length: How many tokens; `None` for as many as it can.

    Raises:
        ValueError: If its table of positions ends before.
    """
    if max_length is None:
        return
    config = AutoConfig.from_pretrained(reference.base, revision=reference.revision)
    of_text = config.get_text_config(decoder=True)
    limit = next((value for name in LIMITS if (value := getattr(of_text, name, None))), None)
    if limit is None or max_length <= limit:
        return
    if _has_position_table(config, limit):
        raise ValueError(
            f"max_length={max_length} is more than the {limit} positions of model {reference.name!r}; set it to "
            f"{limit} or less, or leave it out."
        )
    logger.warning_once(
        "max_length=%s is more than the %s positions that model %r was made for: what it answers to longer prompts "
        "may be worth nothing.",
        *(max_length, limit, reference.name),
    )


def _has_position_table(config: PretrainedConfig, limit: int) -> bool:
    """Whether a model looks positions up, by the names and sizes of its weights and buffers; no weight is made."""
    with torch.device("meta"):
        model = auto_class_of(config).from_config(config)
    return any(
        any(part in name for part in OF_POSITIONS) and tensor.ndim > 1 and 0 <= len(tensor) - limit <= SPARE_POSITIONS
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    )


def check_written(tasks: Iterable[Task], language_model: HFLM) -> None:
    """Checks that answers that are written leave room for a prompt.

    Raises:
        ValueError: At the first task whose do not leave any; names it and both numbers.
    """
    longest = language_model.max_length
    for task in tasks:
        if task.OUTPUT_TYPE != "generate_until":
            continue
        options = task.get_config("generation_kwargs") or {}
        written = normalize_gen_kwargs(options, language_model.max_gen_toks)["max_gen_toks"]
        if written >= longest:
            raise ValueError(
                f"task {task.task_name!r} writes up to {written:,} tokens (max_gen_toks), which leaves no room for a "
                f"prompt in max_length={longest:,}; raise max_length, if the model reads more, or leave the task out."
            )


def check_answers(requests: Sequence[Instance], lengths: Sequence[int], language_model: HFLM) -> None:
    """Checks that each answer whose likelihood is asked fits.

    Args:
        requests: Of one kind.
        lengths: Their tokens, from `count_tokens`.
        language_model: The model.

    Raises:
        ValueError: At the first that does not; names task, sample and both numbers.
    """
    longest = language_model.max_length
    if requests[0].request_type != "loglikelihood":
        return
    for request, length in zip(requests, lengths, strict=True):
        if length <= longest:
            continue
        context = request.args[0].rstrip()  # lm-eval counts white space after it to the answer
        answer = length - len(language_model.tok_encode(context, add_special_tokens=False))
        if answer > longest:
            raise ValueError(
                f"task {request.task_name!r}: sample {request.doc_id} has an answer of {answer:,} tokens, more than "
                f"max_length={longest:,}; raise max_length, if the model reads more, or leave that sample out."
            )


def tell_cut_prompts(requests: Sequence[Instance], lengths: Sequence[int], language_model: HFLM) -> None:
    """Says how many prompts of which tasks lose their beginning; once, whatever number of models is asked.

    Args:
        requests: Of one kind. Whole texts are none of them: they are read in parts.
        lengths: Their tokens, from `count_tokens`.
        language_model: The model.
    """
    if requests[0].request_type == "loglikelihood_rolling":
        return
    asked: dict[int, set[tuple[str, int]]] = {}
    cut: dict[int, set[tuple[str, int]]] = {}
    added = len(language_model.tok_encode(""))
    for request, length in zip(requests, lengths, strict=True):
        limit = language_model.max_length - written_tokens(request, language_model)
        not_read = request.request_type == "loglikelihood"  # an answer's last token
        prompt = str(request.task_name), int(request.doc_id or 0)
        asked.setdefault(limit, set()).add(prompt)
        if length + added - not_read > limit:
            cut.setdefault(limit, set()).add(prompt)
    for limit, prompts in cut.items():
        names = sorted({name for name, _ in prompts})
        number = sum(name in names for name, _ in asked[limit])
        logger.warning_once(
            "%s of %s prompts of %s are longer than %s tokens and lose their beginning.",
            *(f"{len(prompts):,}", f"{number:,}", listed(names), f"{limit:,}"),
        )


def listed(names: Sequence[str]) -> str:
    """Returns the first tasks of many, and how many more there are."""
    more = f" and {len(names) - NAMED} other tasks" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
