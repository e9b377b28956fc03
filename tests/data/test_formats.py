"""Data sets are found or clearly refused, and every supported layout becomes one that TRL's SFTTrainer reads."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, IterableDataset
from trl import SFTConfig, SFTTrainer
from trl.data_utils import maybe_convert_to_chatml

from lopt_hf.data.formats import to_trl_format
from lopt_hf.data.loading import load_sft_dataset
from lopt_hf.data.rows import EmptyRowError, RowError
from tests.tiny import make_model, make_tokenizer

ROWS = [{"question": "1 + 1?", "answer": "2"}, {"question": "2 + 2?", "answer": "4"}]
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture(autouse=True)
def separate_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            Dataset.from_list(rows).to_parquet(path)
    return path


def folder_with(path: Path) -> Path:
    path.mkdir()
    return path


def pair(question: str, answer: str) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def stream(rows: list[dict[str, Any]]) -> IterableDataset:
    """A stream whose columns are unknown before its first row, as that of a generator is."""
    dataset = IterableDataset.from_generator(lambda: iter(rows))
    assert dataset.column_names is None
    return dataset


class TestLoad:
    @pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
    @pytest.mark.parametrize("streaming", [False, True])
    def test_file(self, tmp_path: Path, suffix: str, streaming: bool) -> None:
        path = write(tmp_path / f"data{suffix}", ROWS)
        dataset = load_sft_dataset(str(path), streaming=streaming)
        assert isinstance(dataset, IterableDataset if streaming else Dataset)
        assert list(dataset) == ROWS

    def test_folder_has_the_splits_its_files_are_named_after(self, tmp_path: Path) -> None:
        write(tmp_path / "train.jsonl", ROWS)
        write(tmp_path / "test.jsonl", ROWS[:1])
        assert len(load_sft_dataset(str(tmp_path))) == 2
        assert len(load_sft_dataset(str(tmp_path), split="test")) == 1
        assert len(load_sft_dataset(str(tmp_path), split="train[:1]")) == 1

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("names", "unread"),
        [
            (
                ("a.jsonl", "b.jsonl", "c.parquet"),
                r"\(train\) and would not be read: c\.parquet\. Name one file, keep on",
            ),
            (("gsm8k_train.jsonl", "math.jsonl"), r"would not be read: math\.jsonl\. Name"),
        ],
        ids=["formats", "names"],
    )
    def test_files_of_a_folder_that_are_in_no_split_are_named(
        self, tmp_path: Path, names: tuple[str, ...], unread: str, streaming: bool
    ) -> None:
        for name in names:
            write(tmp_path / name, ROWS)
        with pytest.raises(ValueError, match=f"has files that are in none of its splits .*{unread}"):
            load_sft_dataset(str(tmp_path), streaming=streaming)

    def test_a_readme_that_lists_files_leaves_out_the_others(self, tmp_path: Path) -> None:
        write(tmp_path / "a.jsonl", ROWS)
        write(tmp_path / "b.jsonl", ROWS)
        (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
        assert len(load_sft_dataset(str(tmp_path))) == 2

    @pytest.mark.parametrize("name", ["nowhere.jsonl", "./nowhere", "~/nowhere/at/all"])
    def test_missing_file(self, name: str) -> None:
        with pytest.raises(FileNotFoundError, match=f"no file or folder '{name}'"):
            load_sft_dataset(name)

    def test_a_loading_script_is_refused_in_one_line(self, tmp_path: Path) -> None:
        folder = tmp_path / "old"
        write(folder_with(folder) / "train.jsonl", ROWS)
        (folder / "old.py").write_text("raise SystemExit")
        with pytest.raises(ValueError, match="comes with a loading script, which is not run") as error:
            load_sft_dataset(str(folder))
        assert "\n" not in str(error.value)

    def test_unsupported_suffix(self, tmp_path: Path) -> None:
        path = tmp_path / "data.csv"
        path.write_text("question,answer\n")
        with pytest.raises(ValueError, match=r"data\.csv has the unsupported suffix '\.csv'.*\.parquet"):
            load_sft_dataset(str(path))

    def test_empty_file(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="is empty"):
            load_sft_dataset(str(write(tmp_path / "data.jsonl", [])))

    def test_folder_without_data(self, tmp_path: Path) -> None:
        (tmp_path / "notes.md").write_text("nothing here")
        with pytest.raises(ValueError, match="holds no .json, .jsonl, .parquet file"):
            load_sft_dataset(str(tmp_path))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_missing_split_names_those_there_are(self, tmp_path: Path, streaming: bool) -> None:
        path = write(tmp_path / "data.jsonl", ROWS)
        with pytest.raises(ValueError, match=r"split 'validation' of .*data\.jsonl.*\['train'\]"):
            load_sft_dataset(str(path), split="validation", streaming=streaming)

    def test_a_file_has_no_configurations(self, tmp_path: Path) -> None:
        path = write(tmp_path / "data.jsonl", ROWS)
        with pytest.raises(
            ValueError, match=r"dataset_config='main' has no effect on '.*data\.jsonl', .*; leave it out"
        ):
            load_sft_dataset(str(path), "main")

    def test_hub_id_is_passed_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        monkeypatch.setattr("lopt_hf.data.loading.load_dataset", lambda **arguments: calls.append(arguments))
        load_sft_dataset("openai/gsm8k", "main", split="test")
        assert calls == [{"path": "openai/gsm8k", "name": "main", "split": "test", "streaming": False}]

    def test_unreachable_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(**arguments: Any) -> None:
            raise ConnectionError("Couldn't reach the Hub")

        monkeypatch.setattr("lopt_hf.data.loading.load_dataset", refuse)
        with pytest.raises(FileNotFoundError, match="'openai/gsm8k' is neither a file or folder here nor a data set"):
            load_sft_dataset("openai/gsm8k")


CONVERTED = {
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1 and 1", "output": "2", "text": "Below is an instruction"},
            {"instruction": "Greet.", "input": "", "output": "Hello!", "text": "Below is an instruction"},
            {"instruction": "Part.", "input": None, "output": "Bye!", "text": "Below is an instruction"},
        ],
        [pair("Add.\n\n1 and 1", "2"), pair("Greet.", "Hello!"), pair("Part.", "Bye!")],
    ),
    "alpaca without input": ([{"instruction": "Greet.", "output": "Hello!"}], [pair("Greet.", "Hello!")]),
    "metamath": (
        [{"type": "GSM_Rephrased", "query": "1 + 1?", "original_question": "2 - 0?", "response": "2"}],
        [pair("1 + 1?", "2")],
    ),
    "gsm8k": ([{"question": "1 + 1?", "answer": "#### 2"}], [pair("1 + 1?", "#### 2")]),
    "magpie": (
        [{"instruction": "Hi", "response": "Hello", "conversations": [{"from": "human", "value": "Hi"}]}],
        [pair("Hi", "Hello")],
    ),
    "dolly": (
        [{"instruction": "Who?", "context": "Ann left.", "response": "Ann"}],
        [pair("Who?\n\nAnn left.", "Ann")],
    ),
    "math": ([{"problem": "1 + 1?", "solution": "2", "level": 1}], [pair("1 + 1?", "2")]),
    "sharegpt": (
        [
            {
                "id": "a",
                "conversations": [
                    {"from": "system", "value": "Be kind."},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello"},
                ],
            }
        ],
        [
            {
                "id": "a",
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Hello"},
                ],
            }
        ],
    ),
    "conversations in ChatML": (
        [{"conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
        [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}],
    ),
    "messages beside a prompt": (
        [{"prompt": "Hi", "prompt_id": "a", "messages": [{"role": "user", "content": "Hi"}]}],
        [{"prompt_id": "a", "messages": [{"role": "user", "content": "Hi"}]}],
    ),
    "prompt and completion beside messages": (
        [{**pair("Hi", "Hello"), "messages": [{"role": "user", "content": "Hi"}]}],
        [pair("Hi", "Hello")],
    ),
    "text beside a prompt": ([{"text": "Hi. Hello!", "prompt": "Hi."}], [{"text": "Hi. Hello!"}]),
}


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "Hi", "completion": "Hello", "choices": ["a"]},
            "prompt and completion are trained on, not its choices",
        ),
        (
            {"prompt": "Hi", "input": "there", "completion": "Hello"},
            "prompt and completion are trained on, not its input",
        ),
        ({"messages": TURNS, "choices": ["a"], "images": []}, "messages is trained on, not its choices"),
        ({"text": "Hi", "system": "Be kind.", "context": "a"}, "text is trained on, not its system, context"),
        ({"messages": TURNS, "source": "web", "system": "Be kind."}, None),
    ],
)
def test_a_column_that_an_answer_depends_on_is_named_beside_a_layout_of_trl(row: Any, said: Any, caplog: Any) -> None:
    to_trl_format(Dataset.from_list([row]))
    assert caplog.messages == ([] if said is None else [f"The data's {said}."])


@pytest.mark.parametrize("layout", CONVERTED)
@pytest.mark.parametrize("make", [Dataset.from_list, stream], ids=["dataset", "stream"])
def test_converted(layout: str, make: Any) -> None:
    rows, expected = CONVERTED[layout]
    assert list(to_trl_format(make(rows))) == expected


@pytest.mark.parametrize("make", [Dataset.from_list, stream], ids=["dataset", "stream"])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "Once upon a time", "source": "tales"},
        {"messages": [{"role": "user", "content": "Hi"}], "tools": "[]"},
        {"prompt": "The sky is", "completion": " blue."},
        {**pair("Hi", "Hello"), "answer": "Hello"},
        {"input_ids": [1, 2, 3], "completion_mask": [0, 1, 1]},
    ],
    ids=lambda row: "+".join(row),
)
def test_known_to_trl_stays(row: dict[str, Any], make: Any) -> None:
    dataset = make([row])
    converted = to_trl_format(dataset)
    assert list(converted) == [row]
    assert converted is dataset or isinstance(dataset, IterableDataset)  # whose rows are checked as they come


@pytest.mark.parametrize("layout", CONVERTED)
@pytest.mark.parametrize("make", [Dataset.from_list, stream], ids=["dataset", "stream"])
def test_sft_trainer_reads_it(layout: str, make: Any, tmp_path: Path) -> None:
    rows, expected = CONVERTED[layout]
    tokenizer: Any = make_tokenizer()
    trainer: Any = SFTTrainer(
        model=make_model(),
        args=SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=to_trl_format(make(rows)),
        processing_class=tokenizer,
    )
    seen = next(iter(trainer.train_dataset))
    if "completion" in expected[0]:  # the loss is on the answer only
        trained_on = [token for token in seen["labels"] if token != -100]
        assert trained_on == tokenizer(expected[0]["completion"][0]["content"] + tokenizer.eos_token)["input_ids"]
    elif "messages" in expected[0]:
        assert seen["input_ids"] == tokenizer.apply_chat_template(expected[0]["messages"], return_dict=False)
    else:
        assert seen["input_ids"] == tokenizer(expected[0]["text"] + tokenizer.eos_token)["input_ids"]


@pytest.mark.parametrize("make", [Dataset.from_list, stream], ids=["dataset", "stream"])
def test_rows_without_an_answer_are_left_out_where_that_is_asked_for(make: Any, caplog: Any) -> None:
    rows = [{**ROWS[0], "answer": answer} for answer in ("2", " ", None, "3")]
    with pytest.raises(RowError, match="row 2: 'answer' is empty"):
        list(to_trl_format(make(rows)))
    assert list(to_trl_format(make(rows), skips_empty=True)) == [pair("1 + 1?", "2"), pair("1 + 1?", "3")]
    said = "2 of 4 rows have no text and are left out." in caplog.text
    assert said == (make is not stream)  # of which nobody knows the end
    with pytest.raises(RowError, match=r"row 3: 'answer' holds int 4"):
        list(to_trl_format(stream([*rows[:2], {**ROWS[0], "answer": 4}]), skips_empty=True))


EMPTY_CONVERSATIONS: dict[str, Any] = {
    "null": None,
    "no turns": [],
    "blank answer": [TURNS[0], {"role": "assistant", "content": " "}],
    "null answer": [TURNS[0], {"role": "assistant", "content": None}],
    "answer without parts": [TURNS[0], {"role": "assistant", "content": []}],
    "blank question": [{"role": "user", "content": ""}, TURNS[1]],
}


@pytest.mark.parametrize("make", [Dataset.from_list, stream], ids=["dataset", "stream"])
@pytest.mark.parametrize("case", EMPTY_CONVERSATIONS)
def test_conversations_without_text_are_left_out_where_that_is_asked_for(make: Any, case: str) -> None:
    rows = [{"messages": TURNS}, {"messages": EMPTY_CONVERSATIONS[case]}, {"messages": TURNS}]
    if case == "answer without parts":  # in a table all contents are of one kind
        rows = [{"messages": json.dumps(row["messages"])} for row in rows]
    with pytest.raises(EmptyRowError, match="^row 2: "):
        list(to_trl_format(make(rows)))
    assert [row["messages"] for row in to_trl_format(make(rows), skips_empty=True)] == [TURNS, TURNS]


def test_a_call_is_no_empty_answer_and_what_is_wrong_is_not_left_out() -> None:
    call = [TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    assert len(list(to_trl_format(stream([{"messages": call}]), skips_empty=True))) == 1
    for wrong in (5, [TURNS[0], {"role": "narrator", "content": ""}], [TURNS[0], {"role": "tool"}]):
        with pytest.raises(RowError, match="^row 2: ") as error:
            list(to_trl_format(stream([{"messages": TURNS}, {"messages": wrong}]), skips_empty=True))
        assert not isinstance(error.value, EmptyRowError)


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
LATE: dict[str, tuple[Any, Any]] = {
    "a key of JSON text": (
        {"messages": json.dumps(TURNS)},
        {"messages": json.dumps([TURNS[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}])},
    ),
    "a key of ShareGPT": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": None}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello", "weight": 0.5}]},
    ),
    "another kind of content": (
        {"messages": json.dumps(TURNS)},
        {"messages": json.dumps([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TURNS[1]])},
    ),
}


@pytest.mark.parametrize("case", LATE)
def test_a_key_of_a_message_may_come_late(case: str) -> None:
    """After more rows than `datasets` tells a column's type from."""
    early, late = LATE[case]
    converted = to_trl_format(Dataset.from_list([early] * 1000 + [late]))
    assert converted[0] == {"messages": TURNS}
    (expected,) = to_trl_format(stream([late]))
    assert converted[1000] == expected and len(converted) == 1001


def test_what_fits_into_no_table_is_one_line() -> None:
    for value, why in ((10**30, "int too big"), ("\ud800", "surrogates not allowed")):
        late = json.dumps([{**TURNS[0], "more": value}, TURNS[1]])
        rows = Dataset.from_list([{"messages": json.dumps(TURNS)}] * 1000 + [{"messages": late}])
        with pytest.raises(RowError, match=f"^row 1001: 'messages' holds .*kept as JSON .*{why}.*as text") as error:
            to_trl_format(rows)
        assert "\n" not in str(error.value)


def test_a_column_of_text_that_is_asked_for_wins() -> None:
    rows = Dataset.from_list([{"content": "Once.", **ROWS[0]}])
    assert to_trl_format(rows, text_field="content")["content"] == ["Once."]
    with pytest.raises(ValueError, match=r"dataset_text_field='body' is no column .*'content'"):
        to_trl_format(rows, text_field="body")
    with pytest.raises(RowError, match="row 1: 'content' is empty"):
        to_trl_format(Dataset.from_list([{"content": ""}]), text_field="content")


def test_trl_alone_keeps_sharegpt_roles() -> None:
    """The reason for our own conversion; if TRL maps the roles one day, ours can go."""
    row = maybe_convert_to_chatml({"conversations": [{"from": "human", "value": "Hi"}]})
    assert row["messages"][0]["role"] == "human"


@pytest.mark.parametrize("make", [Dataset.from_list, stream], ids=["dataset", "stream"])
class TestRefused:
    def test_unknown_layout(self, make: Any) -> None:
        with pytest.raises(ValueError, match=r"\['premise', 'label'\].*instruction, \[input\], output.*messages|text"):
            to_trl_format(make([{"premise": "a", "label": 1}]))

    def test_answer_that_is_no_text(self, make: Any) -> None:
        with pytest.raises(ValueError, match="'answer' holds int"):
            to_trl_format(make([{"question": "Which?", "choices": ["a", "b"], "answer": 1}]))

    def test_empty(self, make: Any) -> None:
        with pytest.raises(ValueError, match="empty"):
            to_trl_format(make([]))
