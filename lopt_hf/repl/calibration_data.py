"""Calibration data as batches of model inputs."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch

from lopt_hf.common.settings import check_left_out
from lopt_hf.repl.config import CUTTING, RepLConfig

__all__ = ["check_lengths", "learned_positions", "make_batches"]

Batch = dict[str, torch.Tensor]
LEARNED_POSITIONS = ("gpt2", "opt")  # families whose tables of positions end
READABLE = (("text",), ("messages",), ("prompt", "completion"))  # columns of a row with text


def make_batches(data: Any, processing_class: Any, config: RepLConfig) -> list[Batch]:
    """Cuts calibration data into sequences, at most `calibration_tokens` of them.

    Args:
        data: Texts; a data set with a column `text`, `input_ids`, `messages`, or `prompt` and `completion`; or batches
            of model inputs (dictionaries of tensors, a tokenizer's among them), which are taken as they are, but for
            sequences of padding alone. Of rows with an `attention_mask` padding is left out.
        processing_class: The tokenizer, where there is text.
        config: Says how many tokens, in which pieces.

    Raises:
        ValueError: If there is no data, not a whole sequence of it, no tokenizer for it, no token in it, or no text
            to cut as the config says.
    """
    if data is None:
        needs = {f"init={config.init!r}": "set init to 'skip'"} if config.init == "calibrate" else {}
        if config.chooses_by_data:
            needs[f"placement={config.placement!r}"] = "name the layers (layers_to_replace, spans)"
        raise ValueError(
            f"calibration_data is missing, but {' and '.join(needs)} must have it; pass texts or a data set, or "
            f"{' and '.join(needs.values())}."
        )
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        name = type(data).__name__
        raise ValueError(
            f"calibration_data is a {name}; pass texts, one split of a data set, or a list of batches of inputs."
        )
    rows = iter([data] if isinstance(data, str) else data)
    first = list(islice(rows, 1))
    if not first:
        raise ValueError("calibration_data is empty; check the file or split it was loaded from.")
    rows = chain(first, rows)
    if _is_batch(first[0]):
        if config.calibration_seed is not None:
            raise ValueError(
                f"calibration_seed={config.calibration_seed} draws sequences from text, but calibration_data are "
                "batches already, which are all taken; leave it out, or pass texts or a data set."
            )
        check_left_out(
            config,
            [name for name in CUTTING if name != "calibration_seed"],
            "cuts sequences from text, but calibration_data are batches already, which are taken as they are; leave "
            "it out, or pass texts or a data set.",
        )
        batches = [batch for batch in map(_sequences_with_tokens, rows) if len(next(iter(batch.values())))]
        if not batches:
            raise ValueError(
                "calibration_data has padding alone: every attention_mask is 0; give sequences with tokens."
            )
        return batches
    return _pack(_token_ids(rows, processing_class), config)


def _pack(token_ids: Iterator[int], config: RepLConfig) -> list[Batch]:
    length, size = config.calibration_seq_length, config.calibration_batch_size
    seed = config.calibration_seed
    tokens = list(islice(token_ids, config.calibration_tokens) if seed is None else token_ids)
    if min(len(tokens), config.calibration_tokens) < length:
        raise ValueError(
            f"calibration_data gives {len(tokens)} tokens of calibration_tokens={config.calibration_tokens}, less "
            f"than one sequence of calibration_seq_length={length}; pass more data or shorten the sequences."
        )
    rows_BT = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
    if seed is not None:
        order = torch.randperm(len(rows_BT), generator=torch.Generator().manual_seed(seed))
        rows_BT = rows_BT[order[: config.calibration_tokens // length]]
    return [{"input_ids": batch_BT} for batch_BT in rows_BT.split(size)]


def _is_batch(row: Any) -> bool:
    """Whether it is a batch of inputs, and no row of a data set, whose tensors have one dimension."""
    if not isinstance(row, Mapping) or not all(isinstance(value, torch.Tensor) for value in row.values()):
        return False
    return any(value.ndim > 1 for value in row.values())


def _sequences_with_tokens(batch: Mapping[str, torch.Tensor]) -> Batch:
    """A batch without its `labels`, and without sequences of padding alone, of which there is no mean over tokens."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if "attention_mask" not in inputs:
        return inputs
    has_tokens_B = inputs["attention_mask"].bool().any(1)
    return inputs if has_tokens_B.all() else {name: value[has_tokens_B] for name, value in inputs.items()}


def _token_ids(rows: Iterable[Any], tokenizer: Any) -> Iterator[int]:
    for row in rows:
        if isinstance(row, Mapping) and "input_ids" in row:
            yield from _tokens_of(row)
            continue
        if tokenizer is None:
            raise ValueError("processing_class is missing; pass the model's tokenizer for calibration_data with text.")
        yield from tokenizer(_text(row, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]


def _tokens_of(row: Mapping[str, Any]) -> list[int]:
    """The tokens of a tokenised row that are no padding."""
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    if ids.ndim != 1:
        raise ValueError(
            "calibration_data has input_ids of more than one row that are no tensor; call the tokenizer with "
            "return_tensors='pt', or pass its rows one by one."
        )
    mask = row.get("attention_mask")
    return (ids if mask is None else ids[torch.as_tensor(mask).bool()]).tolist()


def _text(row: Any, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise ValueError(f"calibration_data has a row of type {type(row).__name__}; pass texts, or rows with columns.")
    columns = next((names for names in READABLE if set(names) <= row.keys()), None)
    if columns is None:
        raise ValueError(
            f"calibration_data has the columns {sorted(row)}, but none that can be read (text; input_ids; messages; "
            "prompt + completion); rename the columns."
        )
    for name in columns:
        if row[name] is None:
            raise ValueError(f"calibration_data has a row whose {name!r} is None; leave such rows out.")
    if columns == ("text",):
        return row["text"]
    values = [row[name] for name in columns]
    if isinstance(values[0], str):
        return "".join(values)
    return tokenizer.apply_chat_template([message for value in values for message in value], tokenize=False)


def learned_positions(config: Any) -> float:
    """How many positions a model knows: as many as it has learned, else any number."""
    return config.max_position_embeddings if config.model_type in LEARNED_POSITIONS else float("inf")


def check_lengths(batches: Iterable[Mapping[str, torch.Tensor]], config: Any) -> None:
    """Checks that a model knows all positions of calibration data.

    Args:
        batches: The data, as `make_batches` gives them.
        config: The model's.

    Raises:
        ValueError: If a sequence is longer than its table of positions.
    """
    longest = max((batch["input_ids"].shape[1] for batch in batches if "input_ids" in batch), default=0)
    most = learned_positions(config)
    if longest > most:
        raise ValueError(
            f"calibration_data has sequences of {longest} tokens, but model={config.model_type} has learned {most} "
            f"positions; set calibration_seq_length to at most {most}, or cut the batches."
        )
