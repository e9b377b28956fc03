"""Data where no hub answers: from a folder with copies, or generated, and one line that says which."""

import json
import logging

import pytest

from lopt_hf.common.evaluation import general_text
from lopt_hf.data.loading import NoHubError, load_sft_dataset
from lopt_hf.data.mirror import find_in_mirror, given_data_dir
from lopt_hf.data.texts import prose, read_text
from lopt_hf.scripts.sft import SFTDataArguments, load_split

ROWS = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """GSM8K's two splits as files, WikiText as text, and another data set as a folder."""
    monkeypatch.delenv("LOPT_HF_DATA_DIR", raising=False)
    folder = tmp_path / "copies"
    (folder / "someone/sums").mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    for path in ("gsm8k_train.jsonl", "someone/sums/test.jsonl"):
        (folder / path).write_text(rows)
    (folder / "gsm8k_test.jsonl").write_text(rows.splitlines()[0])
    (folder / "wikitext-2-raw-v1_test.txt").write_text("Once.\n")
    return folder


def test_a_copy_wins_over_the_hub_and_says_so(data_dir, caplog):
    assert list(load_sft_dataset("openai/gsm8k", "main", "train", data_dir=data_dir)) == ROWS
    assert [record.getMessage() for record in caplog.records] == [
        f"Data: openai/gsm8k, split train, from its copy {data_dir / 'gsm8k_train.jsonl'}, "
        "taken for the configuration 'main', which it does not name."
    ]
    assert len(load_sft_dataset("openai/gsm8k", "main", "test", data_dir=data_dir)) == 1
    assert len(load_sft_dataset("openai/gsm8k", "main", "train[:2]", data_dir=data_dir)) == 2
    assert list(load_sft_dataset("someone/sums", None, "test", data_dir=data_dir)) == ROWS


def test_a_configuration_of_a_copy_in_a_folder(data_dir):
    """The hub's name for it: a folder within the copy, or nothing where the copy has no configurations."""
    assert list(load_sft_dataset("someone/sums", "main", "test", data_dir=data_dir)) == ROWS
    (data_dir / "someone/sums/socratic").mkdir()
    (data_dir / "someone/sums/socratic/test.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert list(load_sft_dataset("someone/sums", "socratic", "test", data_dir=data_dir)) == ROWS[:1]


def test_the_copy_of_the_configuration_wins_over_one_of_no_configuration(data_dir, caplog):
    """As a file, as a folder, and as text; of a copy that names none the line says so."""
    for name in ("gsm8k_socratic_train.jsonl", "main_test.jsonl"):
        (data_dir / name).write_text(json.dumps(ROWS[2]) + "\n")
    (data_dir / "wikitext_test.txt").write_text("Of no configuration.")
    for config, split in (("socratic", "train"), ("main", "test")):
        assert list(load_sft_dataset("openai/gsm8k", config, split, data_dir=data_dir)) == ROWS[2:]
    assert read_text("Salesforce/wikitext:wikitext-2-raw-v1:test", "eval_text", str(data_dir)) == "Once.\n"
    assert list(load_sft_dataset("openai/gsm8k", None, "train", data_dir=data_dir)) == ROWS
    (data_dir / "someone/sums/hard").mkdir()
    (data_dir / "someone/sums/hard/test.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    assert list(load_sft_dataset("someone/sums", "hard", "test", data_dir=data_dir)) == ROWS[1:2]
    assert "does not name" not in caplog.text
    load_sft_dataset("someone/sums", "easy", "test", data_dir=data_dir)
    assert "from its copy " in caplog.messages[-1] and "configuration 'easy', which it" in caplog.messages[-1]
    read_text("Salesforce/wikitext:wikitext-103-v1:test", "eval_text", str(data_dir))
    assert "wikitext_test.txt, taken for the configuration 'wikitext-103-v1', which it" in caplog.messages[-1]


def test_the_environment_names_the_folder(data_dir, monkeypatch):
    monkeypatch.setenv("LOPT_HF_DATA_DIR", str(data_dir))
    assert len(load_sft_dataset("openai/gsm8k", "main")) == 3
    monkeypatch.setenv("LOPT_HF_DATA_DIR", str(data_dir / "nowhere"))
    with pytest.raises(ValueError, match="LOPT_HF_DATA_DIR='.*nowhere' is no folder"):
        load_sft_dataset("openai/gsm8k")


def test_no_copy_and_no_hub(data_dir):
    assert find_in_mirror(data_dir, "openai/gsm8k", None, "validation") is None
    with pytest.raises(NoHubError, match="set data_dir to a folder with a copy"):
        load_sft_dataset("tatsu-lab/alpaca", data_dir=data_dir)
    with pytest.raises(ValueError, match="data_dir='zz' is no folder"):
        given_data_dir("zz")


def test_generated_data_take_the_place_of_the_hubs_once_and_for_all(caplog):
    arguments = SFTDataArguments(dataset_name="tatsu-lab/alpaca", dataset_fallback="word-problems")
    train, test = (load_split(arguments, split, seed=0) for split in ("train", "test"))
    assert (len(train), len(test)) == (512, 64)
    assert arguments.dataset_name == "word-problems"  # what the model's card will name
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("Data: no hub answers for tatsu-lab/alpaca; this run takes 'word-problems' instead")


def test_only_the_first_of_several_processes_says_it(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    load_split(SFTDataArguments(dataset_name="tatsu-lab/alpaca", dataset_fallback="word-problems"), "train", seed=0)
    assert not caplog.records


def test_without_a_fallback_or_for_other_rows_only_there_is_none():
    with pytest.raises(NoHubError):
        load_split(SFTDataArguments(dataset_name="tatsu-lab/alpaca"), "train", seed=0)
    arguments = SFTDataArguments(dataset_name="tatsu-lab/alpaca", dataset_fallback="word-problems")
    with pytest.raises(NoHubError):  # the run has trained on the hub's
        load_split(arguments, "test", seed=0)
    arguments = SFTDataArguments(dataset_name="tatsu-lab/alpaca", dataset_fallback="word-problem")
    with pytest.raises(ValueError, match="dataset_fallback='word-problem' is unknown, nearest is 'word-problems'"):
        load_split(arguments, "train", seed=0)


def test_texts(data_dir, tmp_path, caplog):
    wikitext = "Salesforce/wikitext:wikitext-2-raw-v1:test"
    assert read_text(wikitext, "eval_text", str(data_dir)) == "Once.\n"
    assert "from its copy" in caplog.records[-1].getMessage()
    assert read_text(wikitext, "eval_text", fallback="second") == prose("second")
    assert caplog.records[-1].getMessage().startswith("Data: no hub answers for Salesforce/wikitext; eval_text is the")
    assert prose("first") + prose("second") == general_text()
    with pytest.raises(NoHubError, match="eval_text='Salesforce/wikitext:wikitext-2-raw-v1:test': .* is neither"):
        read_text(wikitext, "eval_text", fallback=None)
    (tmp_path / "a.txt").write_text("Twice.")
    assert read_text(str(tmp_path / "a.txt"), "eval_text") == "Twice."
    with pytest.raises(ValueError, match="eval_text='b.txt' is no file here"):
        read_text("b.txt", "eval_text")


def test_documents_are_parted_and_lines_are_not(data_dir):
    """WikiText's rows are lines, the blank ones without an end."""
    for name, documents in {
        "lines": ["", " = Title = \n", "", " One. \n", " Two. \n", ""],
        "documents": ["One.", "Two.\nThree.", "", "Four."],
    }.items():
        rows = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (data_dir / f"{name}_train.jsonl").write_text(rows)
    lines, parted = (read_text(f"a/b:{name}:train", "eval_text", str(data_dir)) for name in ("lines", "documents"))
    assert lines == " = Title = \n One. \n Two. \n"
    assert parted == "One.\n\nTwo.\nThree.\n\nFour."
