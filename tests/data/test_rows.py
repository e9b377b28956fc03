"""Every row is checked: what cannot be trained on is refused by its number, and what has a meaning is not lost."""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, IterableDataset, load_dataset

from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.preferences import to_preferences
from lopt_hf.data.questions import to_questions
from lopt_hf.data.rows import RowError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be kind."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
CONVERTERS = {"sft": to_trl_format, "dpo": to_preferences, "grpo": to_questions}
PAIR = {"instruction": "Hi", "output": "Hello"}
SHAREGPT = {"conversations": [HUMAN, GPT]}
MESSAGES = {"messages": [USER, ANSWER]}
DPO_TEXT = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
DPO = {"prompt": [USER], "chosen": [ANSWER], "rejected": [{"role": "assistant", "content": "Go away"}]}


@pytest.fixture(autouse=True)
def separate_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def load(folder: Path, rows: list[dict[str, Any]], streaming: bool) -> Any:
    """Rows as a file gives them: with null for every key that a row does not have."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset("json", data_files=str(path), split="train", streaming=streaming)


def turns(*others: Any) -> list[dict[str, Any]]:
    return [SHAREGPT, {"conversations": list(others)}]


BAD_ROWS = {
    "null answer": ("sft", [PAIR, {**PAIR, "output": None}], "'output' is null"),
    "missing key": ("sft", [PAIR, {"instruction": "Hi"}], "'output' is null"),
    "number": ("sft", [PAIR, {**PAIR, "output": 3}], "'output' holds int 3, not text"),
    "list": ("sft", [PAIR, {**PAIR, "output": ["Hello"]}], r"'output' holds list \['Hello'\], not text"),
    "blank answer": ("sft", [PAIR, {**PAIR, "output": " "}], "'output' is empty"),
    "blank question": ("sft", [PAIR, {**PAIR, "instruction": ""}], "'instruction' is empty"),
    "number as input": ("sft", [PAIR, {**PAIR, "input": 7}], "'input' holds int 7"),
    "blank text": ("sft", [{"text": "a"}, {"text": ""}], "'text' is empty"),
    "null text": ("sft", [{"text": "a"}, {"text": None}], "'text' is null"),
    "no tokens": ("sft", [{"input_ids": [1, 2]}, {"input_ids": []}], r"'input_ids' is \[\]"),
    "null messages": ("sft", [MESSAGES, {"messages": None}], "'messages' is null"),
    "empty messages": ("sft", [MESSAGES, {"messages": []}], "'messages' is an empty list"),
    "messages as text": ("sft", [MESSAGES, {"messages": "Hi"}], "'messages' is text that is no JSON list"),
    "messages as a number": ("sft", [MESSAGES, {"messages": 5}], "'messages' holds int 5, not a list"),
    "turn as text": ("sft", [MESSAGES, {"messages": ["Hi"]}], "turn 1 of 'messages' is 'Hi', not a message"),
    "null content": ("sft", [MESSAGES, {"messages": [USER, {"role": "assistant"}]}], r"turn 2 .*no content"),
    "number as content": (
        "sft",
        [MESSAGES, {"messages": [{"role": "user", "content": 5}, ANSWER]}],
        r"turn 1 of 'messages' \(user\) has the content 5",
    ),
    "no role": ("sft", [MESSAGES, {"messages": [{"content": "Hi"}]}], "turn 1 of 'messages' has no role"),
    "empty answer": ("sft", turns(HUMAN, {"from": "gpt", "value": ""}), r"turn 2 of 'conversations' \(assistant\) is"),
    "null turn": ("sft", turns(HUMAN, {"from": None, "value": None}), "turn 2 of 'conversations' has no role"),
    "unknown role": ("sft", turns(HUMAN, {"from": "narrator", "value": "x"}), "the role 'narrator', which chat"),
    "function call": ("sft", turns(HUMAN, {"from": "function_call", "value": "{}"}), "'assistant' turn with tool_"),
    "observation": ("sft", turns(HUMAN, {"from": "observation", "value": "1"}), "as a 'tool' turn"),
    "two roles": ("sft", [MESSAGES, {"messages": [{**USER, "from": "gpt"}]}], "role 'user' and the from 'gpt'"),
    "two systems": (
        "sft",
        [SHAREGPT, {"system": "Be kind.", "conversations": [{"from": "system", "value": "Be rude."}, HUMAN, GPT]}],
        "'Be kind.' in a column of its own and 'Be rude.' in the conversation",
    ),
    "python repr": ("sft", [{"messages": "[]"}, {"messages": str([USER, ANSWER])}], "'messages' is an empty list"),
    "broken JSON": (
        "sft",
        [{"messages": json.dumps([USER, ANSWER])}, {"messages": str([USER, ANSWER])}],
        "'messages' is text that is no JSON list",
    ),
    "completion null": ("sft", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "'completion' is null"),
    "completion as messages": (
        "sft",
        [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": [ANSWER]}],
        "'completion' holds messages",
    ),
    "choices": ("sft", [{"question": "a", "answer": "b"}, {"question": "a", "answer": "b", "choices": ["b", "c"]}],
                "'choices' is .* has no place"),
    "history": ("sft", [PAIR, {**PAIR, "history": [["Hi"]]}], "entry 1 of 'history' is .* not a question and its"),
    "system beside text": ("sft", [{"prompt": "a", "completion": "b"},
                                   {"prompt": "a", "completion": "b", "system": "c"}], "'system' is 'c', for which"),
    "chosen null": ("dpo", [DPO_TEXT, {**DPO_TEXT, "chosen": None}], "'chosen' is null"),
    "rejected blank": ("dpo", [DPO_TEXT, {**DPO_TEXT, "rejected": "  "}], "'rejected' is empty"),
    "prompt a number": ("dpo", [DPO_TEXT, {**DPO_TEXT, "prompt": 4}], "'prompt' holds int 4"),
    "chosen without turns": ("dpo", [DPO, {**DPO, "chosen": []}], "'chosen' is an empty list"),
    "chosen ends with the user": ("dpo", [DPO, {**DPO, "chosen": [ANSWER, USER]}], "'chosen' ends with a message of"),
    "rejected broken JSON": ("dpo", [DPO, {**DPO, "rejected": "[{'role': 'user'"}], "'rejected' is text that is no"),
    "no question": ("dpo", [{"question": "a", "chosen": "b", "rejected": "c"}, {"chosen": "b", "rejected": "c"}],
                    "'question' is null"),
    "system beside a prompt as text": ("dpo", [DPO_TEXT, {**DPO_TEXT, "system": "Be kind."}], "'system' is 'Be kind"),
    "another prompt": ("dpo", [DPO, {**DPO, "chosen": [SYSTEM, ANSWER], "rejected": [SYSTEM, ANSWER]}], "'prompt' is"),
    "question null": ("grpo", [{"question": "a"}, {"question": None, "answer": "b"}], "'question' is null"),
    "prompt null": ("grpo", [{"prompt": "a"}, {"answer": "b"}], "'prompt' is null"),
    "prompt empty": ("grpo", [{"prompt": [USER]}, {"prompt": []}], "'prompt' is an empty list"),
    "prompt of another kind": ("grpo", [{"prompt": "a"}, {"prompt": [USER]}], "'prompt' holds messages"),
    "problem a number": ("grpo", [{"problem": "a"}, {"problem": 2}], "'problem' holds int 2"),
    "question with choices": ("grpo", [{"question": "a"}, {"question": "b", "choices": ["c"]}], "'choices' is"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_is_named(tmp_path: Path, case: str, streaming: bool) -> None:
    command, rows, message = BAD_ROWS[case]
    number = 1 if case == "python repr" else len(rows) + 1
    given = [rows[0], *rows]
    with pytest.raises(RowError, match=f"^row {number}: .*{message}") as error:
        list(CONVERTERS[command](load(tmp_path, given, streaming)))
    assert "\n" not in str(error.value)


def test_a_stream_is_checked_as_it_comes() -> None:
    rows = [PAIR, PAIR, {"instruction": "Hi"}]
    converted = iter(to_trl_format(IterableDataset.from_generator(lambda: iter(rows))))
    assert next(converted) == next(converted) == {"prompt": [USER], "completion": [ANSWER]}
    with pytest.raises(RowError, match="^row 3: 'output' is missing; the row has 'instruction'"):
        next(converted)


def prompt(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": list(messages), "completion": [ANSWER]}


MAPPED = {
    "sharegpt with mixed keys": (
        "sft",
        {"conversations": [{**HUMAN, "role": None, "content": None}, {**ANSWER, "from": None, "value": None}]},
        MESSAGES,
    ),
    "messages with mixed keys": ("sft", {"messages": [{**USER, "from": None, "value": None}, ANSWER]}, MESSAGES),
    "sharegpt in messages": ("sft", {"messages": [HUMAN, GPT]}, MESSAGES),
    "a null column of another layout": ("sft", {"messages": None, "prompt": None, "completion": None, **PAIR},
                                        prompt(USER)),
    "roles of other services": (
        "sft",
        {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "chatgpt", "value": "Hello"},
                           {"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello"}]},
        {"messages": [USER, ANSWER, USER, ANSWER]},
    ),
    "alpaca's system and history": (
        "sft",
        {**PAIR, "system": "Be kind.", "history": [["Hi", "Hello"]]},
        prompt(SYSTEM, USER, ANSWER, USER),
    ),
    "alpaca's empty system and history": ("sft", {**PAIR, "system": "", "history": []}, prompt(USER)),
    "history as JSON": ("sft", {**PAIR, "history": '[["Hi", "Hello"]]'}, prompt(USER, ANSWER, USER)),
    "sharegpt's system": ("sft", {"system": "Be kind.", **SHAREGPT}, {"messages": [SYSTEM, USER, ANSWER]}),
    "a system that is there already": (
        "sft",
        {"system": "Be kind.", "messages": [SYSTEM, USER, ANSWER]},
        {"system": "Be kind.", "messages": [SYSTEM, USER, ANSWER]},
    ),
    "orca": (
        "sft",
        {"system_prompt": "Be kind.", "question": "Hi", "response": "Hello"},
        prompt(SYSTEM, USER),
    ),
    "tools stay": ("sft", {**PAIR, "tools": "[]"}, {"tools": "[]", **prompt(USER)}),
    "JSON in messages": ("sft", {"messages": json.dumps([USER, ANSWER])}, MESSAGES),
    "JSON in conversations": ("sft", {"conversations": json.dumps([HUMAN, GPT])}, MESSAGES),
    "JSON in prompt and completion": (
        "sft",
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        prompt(USER),
    ),
    "a call has no content": (
        "sft",
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]},
    ),
    "orca's preferences": (
        "dpo",
        {"system": "Be kind.", "question": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {**DPO, "prompt": [SYSTEM, USER]},
    ),
    "preferences with an input": (
        "dpo",
        {"instruction": "Say:", "input": "Hello", "chosen": "Hello", "rejected": "Go away"},
        {**DPO, "prompt": [{"role": "user", "content": "Say:\n\nHello"}]},
    ),
    "preferences with a history": (
        "dpo",
        {**DPO, "history": [["Hi", "Hello"]]},
        {**DPO, "prompt": [USER, ANSWER, USER]},
    ),
    "JSON in chosen and rejected": (
        "dpo",
        {name: json.dumps(value) for name, value in DPO.items()},
        DPO,
    ),
    "ultrafeedback": (
        "dpo",
        {"prompt": "Hi", "chosen": [USER, *DPO["chosen"]], "rejected": [USER, *DPO["rejected"]], "messages": [USER]},
        DPO,
    ),
    "answers that begin with their prompt": (
        "dpo",
        {"system": "Be kind.", "chosen": [USER, ANSWER], "rejected": [USER, *DPO["rejected"]]},
        {"chosen": [SYSTEM, USER, ANSWER], "rejected": [SYSTEM, USER, *DPO["rejected"]]},
    ),
    "preferences as text": ("dpo", DPO_TEXT, DPO_TEXT),
    "a question's system and history": (
        "grpo",
        {"system": "Be kind.", "history": [["Hi", "Hello"]], "question": "Hi", "answer": "b"},
        {"prompt": [SYSTEM, USER, ANSWER, USER], "answer": "b"},
    ),
    "JSON in a prompt": ("grpo", {"prompt": json.dumps([USER])}, {"prompt": [USER]}),
}  # fmt: skip


def without_nulls(value: Any) -> Any:
    """Arrow gives every message of a column all keys."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("case", MAPPED)
def test_what_has_a_meaning_is_mapped(tmp_path: Path, case: str) -> None:
    command, row, expected = MAPPED[case]
    (converted,) = CONVERTERS[command](Dataset.from_list([row]))
    assert without_nulls({name: converted[name] for name in expected}) == without_nulls(expected)
    (streamed,) = CONVERTERS[command](IterableDataset.from_generator(lambda: iter([row])))
    assert {name: streamed[name] for name in expected} == expected
    layouts = {"prompt", "completion", "messages", "conversations", "chosen", "rejected", "instruction", "question"}
    assert converted.keys() & layouts == expected.keys() & layouts


def test_parquet_with_mixed_keys_keeps_its_conversations(tmp_path: Path) -> None:
    rows = [{"conversations": [HUMAN, GPT]}, {"conversations": [USER, ANSWER]}]
    Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    stored = load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), split="train")
    assert stored[0]["conversations"][0].keys() == {"from", "value", "role", "content"}  # the premise
    assert list(to_trl_format(stored)) == [MESSAGES, MESSAGES]


def test_columns_that_are_left_out_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "lopt_hf"):
        to_trl_format(Dataset.from_list([{**PAIR, "system": "Be kind.", "text": "Hi. Hello", "topic": "manners"}]))
    assert caplog.messages == ["The data's instruction and output are trained on, not its text, topic."]


@pytest.mark.parametrize("command", ["sft", "dpo", "grpo"])
def test_data_with_nothing_to_change_is_the_same_object(command: str) -> None:
    dataset = Dataset.from_list([{"sft": MESSAGES, "dpo": DPO, "grpo": {"prompt": [USER]}}[command]] * 2)
    assert CONVERTERS[command](dataset) is dataset


LAYOUTS: list[tuple[str, dict[str, Any]]] = [
    ("sft", {**PAIR, "input": "now", "system": "Be kind.", "history": [["Hi", "Hello"]]}),
    ("sft", MESSAGES),
    ("sft", {**SHAREGPT, "system": "Be kind."}),
    ("sft", {"prompt": "Hi", "completion": "Hello"}),
    ("sft", {"prompt": [USER], "completion": [ANSWER]}),
    ("sft", {"text": "Hi. Hello"}),
    ("dpo", DPO),
    ("dpo", DPO_TEXT),
    ("dpo", {"question": "Hi", "system": "Be kind.", "chosen": "Hello", "rejected": "Go away"}),
    ("dpo", {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, *DPO["rejected"]]}),
    ("grpo", {"question": "Hi", "system": "Be kind.", "answer": "2"}),
    ("grpo", {"prompt": [USER]}),
]
NASTY = [
    None, "", "  ", 0, 1.5, True, float("nan"), b"x", [], {}, [None], [[]], [{}], ["x"], {"a": 1}, "[", "[]", "[1]",
    "null", "{}", '[{"role": "user"}]', "[{'role': 'user'}]", [USER], [ANSWER], [USER, None], [["Hi", None]],
    [{"role": None, "content": None}], [{"role": 5, "content": "x"}], [{"role": "user", "content": ["x"]}],
    [{"from": ["human"], "value": "x"}], [{"role": "assistant", "tool_calls": [1]}],
]  # fmt: skip


def is_filled(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) and all(
        message["role"] and (message.get("content") or "tool_calls" in message) for message in value
    )


@pytest.mark.parametrize(
    "command, good", LAYOUTS, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_nasty_values_are_refused_or_harmless(command: str, good: dict[str, Any]) -> None:
    """Whatever a row holds is trained on with something in it, or refused by its number."""
    refused = 0
    cases = [(column, value) for column in good for value in NASTY]
    for column, value in cases:
        rows = [good, {**good, column: value}]
        dataset = IterableDataset.from_generator(lambda rows=rows: iter(rows))
        try:
            converted = list(CONVERTERS[command](dataset))[1]
        except RowError as error:
            assert str(error).startswith("row 2: ") and "\n" not in str(error)
            refused += 1
        else:
            read = {"prompt", "completion", "messages", "chosen", "rejected", "text"} & converted.keys()
            assert read and all(is_filled(converted[name]) for name in read), (column, value)
    assert len(cases) / 4 < refused < len(cases)


def test_a_system_column_that_says_what_the_conversation_does() -> None:
    """In Parquet files each message has the keys of all."""
    turns = [{**SYSTEM, "tool_calls": None}, {**USER, "tool_calls": None}, {**ANSWER, "tool_calls": None}]
    converted = to_trl_format(Dataset.from_list([{"messages": turns, "system": "Be kind."}]))
    assert converted[0]["messages"] == turns
