"""Conversations of any origin as messages: `role` and `content`, with the roles that chat templates know."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lopt_hf.data.rows import EmptyRowError, Row, RowError, has_value, read_text, show

__all__ = ["Message", "holds_messages", "read_messages", "read_side", "with_context"]

Message = dict[str, Any]

KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")

# ShareGPT, its copies, and Gemini's exports
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
}

# Roles of tools' data sets: their content is no text to repeat but a call or its result
TOOL_ADVICE = {
    "function_call": "write it as an 'assistant' turn with tool_calls",
    "tool_call": "write it as an 'assistant' turn with tool_calls",
    "observation": "write it as a 'tool' turn that follows the assistant's tool_calls",
    "function_response": "write it as a 'tool' turn that follows the assistant's tool_calls",
    "tool_response": "write it as a 'tool' turn that follows the assistant's tool_calls",
    "function": "write it as a 'tool' turn that follows the assistant's tool_calls",
}

# Keys of an assistant's turn that stand for text
INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking")

_LOOKS_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")


def holds_messages(value: Any) -> bool:
    """Tells whether a column's value is a conversation, be it written as JSON text."""
    return isinstance(value, list) or (isinstance(value, str) and _LOOKS_LIKE_MESSAGES.match(value) is not None)


def read_messages(row: Row, column: str) -> list[Message]:
    """Reads a column that has to hold a conversation.

    A turn's keys may be `role` and `content`, or ShareGPT's `from` and `value`; of keys that are all there, those with
    values count. A conversation written as JSON text is decoded.

    Args:
        row: The row.
        column: The column's name.

    Returns:
        Messages with known roles and without blank turns of a user or an assistant; further keys stay.

    Raises:
        RowError: If it is no such conversation; the message names the column and the turn. An `EmptyRowError` if it
            is null or has no turns, or a turn of a user or an assistant has nothing in it.
    """
    value = row.get(column)
    if column not in row:
        raise RowError(f"{column!r} is missing; give it messages, or remove the row.")
    if value is None:
        raise EmptyRowError(f"{column!r} is null; give it messages, or remove the row.")
    if isinstance(value, str):
        value = _decode(value, column)
    if not isinstance(value, list):
        raise RowError(f"{column!r} holds {type(value).__name__} {show(value)}, not a list of messages.")
    if not value:
        raise EmptyRowError(f"{column!r} is an empty list; give it messages, or remove the row.")
    return [_read_turn(turn, f"turn {number} of {column!r}") for number, turn in enumerate(value, start=1)]


def read_side(row: Row, column: str, conversational: bool, role: str | None = None) -> str | list[Message]:
    """Reads a prompt or an answer: text or messages, of the one kind in all rows.

    Args:
        row: The row.
        column: The column's name.
        conversational: Whether messages are expected.
        role: Whose message a text is in a conversation. `None`: a text is refused there.

    Raises:
        RowError: If it is not of that kind, or is null or empty.
    """
    value = row.get(column)
    if conversational:
        if role is not None and isinstance(value, str) and not holds_messages(value):
            return [{"role": role, "content": read_text(row, column)}]
        return read_messages(row, column)
    if holds_messages(value):
        raise RowError(f"{column!r} holds messages {show(value)} where the first row or its other columns hold text.")
    return read_text(row, column)


def with_context(row: Row, messages: list[Message]) -> list[Message]:
    """Puts before a conversation what the row has of its beginning in other columns.

    Args:
        row: The row. Its `system` (or `system_prompt`) is the system message; its `history` earlier turns, as pairs
            of a question and its answer like those of LLaMA-Factory's Alpaca files, or as messages. Both may be
            missing or empty.
        messages: The conversation.

    Raises:
        RowError: If one of the columns cannot be read, or the conversation begins with what they say otherwise.
    """
    system, history = _read_system(row), _read_history(row)
    own = messages[0]["role"] in ("system", "developer")
    if own and history:
        raise RowError("'history' has a value, but the conversation has a beginning of its own; keep one of them.")
    if own and system and _said(system[0]) != _said(messages[0]):
        raise RowError(
            f"the system message is {show(system[0].get('content'))} in a column of its own and "
            f"{show(messages[0].get('content'))} in the conversation; keep one of them."
        )
    return messages if own else [*system, *history, *messages]


def _said(message: Message) -> tuple[Any, Any]:
    """A message without its other keys, which Parquet gives to all, with null."""
    return message["role"], message.get("content")


def _read_system(row: Row) -> list[Message]:
    columns = [name for name in ("system", "system_prompt") if has_value(row, name)]
    if not columns:
        return []
    return [{"role": "system", "content": read_text(row, columns[0])}]


def _read_history(row: Row) -> list[Message]:
    if not has_value(row, "history"):
        return []
    value = row["history"]
    value = _decode(value, "history") if isinstance(value, str) else value
    if not isinstance(value, list):
        raise RowError(f"'history' holds {type(value).__name__} {show(value)}, not a list of question and answer.")
    if value and all(isinstance(turn, Mapping) for turn in value):
        return read_messages({"history": value}, "history")
    messages: list[Message] = []
    for number, pair in enumerate(value, start=1):
        is_pair = isinstance(pair, Sequence) and len(pair) == 2
        if not is_pair or not all(isinstance(text, str) and text.strip() for text in pair):
            raise RowError(f"entry {number} of 'history' is {show(pair)}, not a question and its answer as text.")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _decode(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise RowError(
            f"{column!r} is text that is no JSON list ({error}): {show(text)}; write it as a list, or by json.dumps."
        ) from None


def _read_turn(turn: Any, place: str) -> Message:
    if not isinstance(turn, Mapping):
        raise RowError(f"{place} is {show(turn)}, not a message with role and content.")
    role = _one_value(turn, place, "role", "from")
    if not isinstance(role, str):
        raise RowError(f"{place} has no role; its keys are {', '.join(map(str, turn))}.")
    role = _known_role(role, place)
    content = _one_value(turn, place, "content", "value")
    _check_content(content, turn, role, place)
    if "from" in turn or "value" in turn:
        others = {key: value for key, value in turn.items() if key not in ("role", "content", "from", "value")}
        return {"role": role, "content": content} | {key: value for key, value in others.items() if value is not None}
    return turn | {"role": role} if isinstance(turn, dict) else {**turn, "role": role}


def _one_value(turn: Row, place: str, key: str, other: str) -> Any:
    value, second = turn.get(key), turn.get(other)
    if value is not None and second is not None and value != second:
        raise RowError(f"{place} has the {key} {show(value)} and the {other} {show(second)}; keep one of them.")
    return second if value is None else value


def _known_role(role: str, place: str) -> str:
    if role in KNOWN_ROLES:
        return role
    name = role.strip().lower()
    if name in KNOWN_ROLES or name in ROLES:
        return ROLES.get(name, name)
    fix = TOOL_ADVICE.get(name, f"rename it to one of {', '.join(KNOWN_ROLES[:5])}")
    raise RowError(f"{place} has the role {role!r}, which chat templates do not know; {fix}.")


def _check_content(content: Any, turn: Row, role: str, place: str) -> None:
    if role == "assistant" and any(turn.get(key) for key in INSTEAD_OF_CONTENT):
        return
    empty = EmptyRowError if role in ("user", "assistant") else RowError
    if content is None:
        raise empty(f"{place} ({role}) has no content: it is null or missing; write it, or remove the row.")
    if not isinstance(content, str | list) or (
        isinstance(content, list) and not all(isinstance(part, Mapping) for part in content)
    ):
        raise RowError(f"{place} ({role}) has the content {show(content)}, which is neither text nor a list of parts.")
    is_blank = not content.strip() if isinstance(content, str) else not content
    if is_blank and role in ("user", "assistant"):
        raise empty(f"{place} ({role}) is empty; write it, or remove the row.")
