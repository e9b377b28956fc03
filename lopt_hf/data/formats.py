"""Supervised data brought into a layout that TRL's `SFTTrainer` reads."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lopt_hf.data.messages import holds_messages, read_messages, read_side, with_context
from lopt_hf.data.rows import (
    CONTEXT_COLUMNS,
    EARLIER_COLUMNS,
    DatasetT,
    Row,
    RowError,
    convert_rows,
    first_row,
    has_value,
    read_question,
    read_text,
    refuse_context,
    say_left_out,
    show,
)

__all__ = ["to_trl_format"]

# What TRL reads as it is, in order of preference where a data set has several
TRL_LAYOUTS = (("input_ids",), ("prompt", "completion"), ("messages",))

# Before which a `system` and a `history` have a place
CONVERSATIONS = (("prompt", "completion"), ("messages",), ("conversations",))
READ_BY_TRL = ("image", "images")

# Every column that makes TRL decide for a layout; those of a layout not chosen have to go
LAYOUT_COLUMNS = frozenset({"prompt", "completion", "messages", "conversations", "chosen", "rejected"})

# (question, answer), and the column with more input for the question, which may be missing or empty
PAIR_LAYOUTS: dict[tuple[str, str], str | None] = {
    ("instruction", "output"): "input",  # Alpaca
    ("instruction", "response"): "context",  # Magpie, without the context; Dolly, with it
    ("query", "response"): None,  # MetaMathQA
    ("question", "response"): None,  # OpenOrca
    ("question", "answer"): None,  # GSM8K
    ("problem", "solution"): None,  # MATH
}

Converter = Callable[[Row], dict[str, Any]]


def to_trl_format(dataset: DatasetT, text_field: str = "text", skips_empty: bool = False) -> DatasetT:
    """Brings a data set into a layout that TRL's `SFTTrainer` reads, and checks every row.

    The first row's columns that are not null tell the layout. TRL's own (`input_ids`; `prompt` and `completion`;
    `messages`; `text`) are left as they are, except that columns which would make TRL see another layout are dropped:
    `SFTTrainer` fails on a `prompt` beside `messages`.

    Pairs of columns become `prompt` and `completion`: Alpaca (`instruction`, `input`, `output`), Magpie and Dolly
    (`instruction`, `context`, `response`), MetaMathQA (`query`, `response`), OpenOrca (`question`, `response`), GSM8K
    (`question`, `answer`) and MATH (`problem`, `solution`). Both sides are conversational, one user and one assistant
    message: so the model's own chat template is used rather than Alpaca's "### Instruction" headers, which chat models
    were not trained on, and TRL takes the loss on the answer only. An input follows its instruction after a blank
    line; a `system` (or `system_prompt`) becomes a system message and `history` earlier turns. A pair wins over a
    `text` or `conversations` beside it, which in Stanford Alpaca and Magpie repeats it. Other columns are dropped,
    which a log line says; beside a pair, one that an answer depends on (`choices`, `images`, ...) is refused instead.
    Beside TRL's own layouts, whose maker has put the prompt together, a log line names it.

    ShareGPT's `conversations` become `messages`: TRL renames their keys, but keeps the roles "human" and "gpt", which
    no chat template knows, and does not read `conversations` whose keys are `role` and `content` already.

    Args:
        dataset: The data. Its rows are converted and checked at once, those of a stream as they come.
        text_field: The column of plain text. Another name than the default is asked for, and wins over every layout.
        skips_empty: Whether to leave out rows without text or answer, instead of refusing them, and say how many there
            were, but of a stream.

    Returns:
        The same kind of data set; the same object if it is a `Dataset` in which there is nothing to change.

    Raises:
        RowError: If a row has nothing to train on, or what its layout has no place for: null, a number or an empty
            list instead of text or messages, a blank question or answer, an unknown role, a broken JSON text.
        ValueError: If the data set is empty or in no known layout.
    """
    first = first_row(dataset)
    layout, convert, dropped = _find_layout(first, text_field)
    say_left_out(layout, _unread(first, layout, dropped))
    return convert_rows(dataset, convert, dropped, skips_empty)


def _unread(first: Row, layout: tuple[str, ...], dropped: Sequence[str]) -> list[str]:
    """The columns that nothing is made of, though an answer may depend on them, or that are dropped."""
    if layout in PAIR_LAYOUTS:  # whose rows are refused where these have a value
        depended_on: tuple[str, ...] = ()
    elif layout in CONVERSATIONS:
        depended_on = CONTEXT_COLUMNS
    else:
        depended_on = EARLIER_COLUMNS + CONTEXT_COLUMNS
    read = (*layout, *EARLIER_COLUMNS, *CONTEXT_COLUMNS)
    return [
        name
        for name in first
        if (name in dropped and name not in read) or (name in depended_on and name not in (*layout, *READ_BY_TRL))
    ]


def _find_layout(first: Row, text_field: str) -> tuple[tuple[str, ...], Converter, list[str]]:
    """The columns that the layout is known by, the converter of rows, and the columns to drop."""
    candidates: list[tuple[tuple[str, ...], Converter, bool]] = [
        (TRL_LAYOUTS[0], _check_token_ids, False),
        (TRL_LAYOUTS[1], partial(_read_prompt_completion, conversational=_is_conversational(first)), False),
        (TRL_LAYOUTS[2], partial(_read_conversation, column="messages"), False),
        *((pair, partial(_read_pair, pair=pair, more_input=more), True) for pair, more in PAIR_LAYOUTS.items()),
        (("conversations",), partial(_read_conversation, column="conversations"), False),
        (("text",), partial(_check_text, column="text"), False),
    ]
    if text_field != "text":
        candidates = [((text_field,), partial(_check_text, column=text_field), False)]
    present = [candidate for candidate in candidates if first.keys() >= set(candidate[0])]
    if not present:
        if text_field != "text":
            raise ValueError(
                f"dataset_text_field={text_field!r} is no column of the data set, which has {list(first)}; name one."
            )
        raise ValueError(
            f"The data set's columns {list(first)} are in no layout known here. Rename them to one of: "
            f"{_accepted_layouts()}; or name a column of plain text by dataset_text_field."
        )
    filled = [candidate for candidate in present if all(first[name] is not None for name in candidate[0])]
    layout, convert, is_pair = (filled or present)[0]
    if is_pair:
        return layout, convert, [name for name in first if name not in ("tools", "prompt", "completion")]
    used = {"messages"} if layout == ("conversations",) else set(layout)
    return layout, convert, [name for name in first if name in LAYOUT_COLUMNS - used]


def _is_conversational(row: Row) -> bool:
    return any(holds_messages(row.get(name)) for name in ("prompt", "completion"))


def _check_token_ids(row: Row) -> dict[str, Any]:
    token_ids = row["input_ids"]
    if not has_value(row, "input_ids"):
        raise RowError(f"'input_ids' is {show(token_ids)}; give it token ids, or remove the row.")
    return {}


def _check_text(row: Row, column: str) -> dict[str, Any]:
    read_text(row, column)
    return {}


def _read_prompt_completion(row: Row, conversational: bool) -> dict[str, Any]:
    prompt = read_side(row, "prompt", conversational, "user")
    completion = read_side(row, "completion", conversational, "assistant")
    if isinstance(prompt, str):
        refuse_context(row, EARLIER_COLUMNS, "of prompt and completion as text")
        return {}
    return {"prompt": with_context(row, prompt), "completion": completion}


def _read_conversation(row: Row, column: str) -> dict[str, Any]:
    return {"messages": with_context(row, read_messages(row, column))}


def _read_pair(row: Row, pair: tuple[str, str], more_input: str | None) -> dict[str, Any]:
    answer = read_text(row, pair[1])
    question = read_question(row, pair[0], more_input)
    return {
        "prompt": with_context(row, [{"role": "user", "content": question}]),
        "completion": [{"role": "assistant", "content": answer}],
    }


def _accepted_layouts() -> str:
    pairs = [f"{question}, [{extra}], {answer}" if extra else f"{question}, {answer}"
             for (question, answer), extra in PAIR_LAYOUTS.items()]  # fmt: skip
    return "; ".join([", ".join(layout) for layout in TRL_LAYOUTS] + pairs + ["conversations", "text"])
