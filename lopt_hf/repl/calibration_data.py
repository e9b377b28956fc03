"""Calibration data as batches of model inputs."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch

from lopt_hf.repl.config import RepLConfig

__all__ = ["make_batches"]

Batch = dict[str, torch.Tensor]


def make_batches(data: Any, processing_class: Any, config: RepLConfig) -> list[Batch]:
    """Cuts calibration data into sequences, at most `calibration_tokens` of them.

    Args:
        data: Texts; a data set with a column `text`, `input_ids`, `messages`, or `prompt` and `completion`; or batches
            of model inputs (dictionaries of tensors), which are taken as they are.
        processing_class: The tokenizer, where there is text.
        config: Says how many tokens, in which pieces.

    Raises:
        ValueError: If there is no data, not a whole sequence of it, no tokenizer for it, or nothing to draw from by a
            seed.
    """
    if data is None:
        needs = {f"init={config.init!r}": "set init to 'skip'"} if config.init == "calibrate" else {}
        if config.chooses_by_data:
            needs[f"placement={config.placement!r}"] = "name the layers (layers_to_replace, spans)"
        raise ValueError(
            f"calibration_data is missing, but {' and '.join(needs)} must have it; pass texts or a data set, or "
            f"{' and '.join(needs.values())}."
        )
    if isinstance(data, dict) or not isinstance(data, Iterable):
        name = type(data).__name__
        raise ValueError(f"calibration_data is a {name}; pass texts, one split of a data set, or batches of inputs.")
    rows = iter([data] if isinstance(data, str) else data)
    first = next(rows, None)
    if first is None:
        raise ValueError("calibration_data is empty; check the file or split it was loaded from.")
    rows = chain([first], rows)
    if isinstance(first, dict) and all(isinstance(value, torch.Tensor) for value in first.values()):
        if config.calibration_seed is not None:
            raise ValueError(
                f"calibration_seed={config.calibration_seed} draws sequences from text, but calibration_data are "
                "batches already, which are all taken; leave it out, or pass texts or a data set."
            )
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in rows]
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


def _token_ids(rows: Iterable[Any], tokenizer: Any) -> Iterator[int]:
    for row in rows:
        if isinstance(row, dict) and "input_ids" in row:
            yield from row["input_ids"]
            continue
        if tokenizer is None:
            raise ValueError("processing_class is missing; pass the model's tokenizer for calibration_data with text.")
        yield from tokenizer(_text(row, tokenizer), add_special_tokens=False, verbose=False)["input_ids"]


def _text(row: Any, tokenizer: Any) -> str:
    if isinstance(row, str):
        return row
    if "text" in row:
        return row["text"]
    if "messages" in row:
        return tokenizer.apply_chat_template(row["messages"], tokenize=False)
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return prompt + completion
        return tokenizer.apply_chat_template(prompt + completion, tokenize=False)
    raise ValueError(
        f"calibration_data has the columns {sorted(row)}, but none that can be read (text; input_ids; messages; "
        "prompt + completion); rename the columns."
    )
