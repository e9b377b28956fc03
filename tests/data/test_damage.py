"""A damaged file is named with the line and the cause, in one line."""

from pathlib import Path

import datasets
import pytest
from datasets import Dataset

from lopt_hf.data.damage import find_damage
from lopt_hf.data.loading import READ_ERRORS, explain_damage, load_sft_dataset

GOOD = b'{"question": "1 + 1?", "answer": "2"}\n'
DAMAGED = {
    "broken last line": (GOOD * 3 + b'{"question": "2 + 2?", "ans', r"line 4: no valid JSON \(.* at character \d+\)"),
    "malformed line": (GOOD + b'{"question": 1 + 1, "answer": "2"}\n' + GOOD, "line 2: no valid JSON"),
    "UTF-16": ((GOOD * 3).decode().encode("utf-16"), "is written in UTF-16; save it as UTF-8"),
    "UTF-32": ((GOOD * 3).decode().encode("utf-32"), "is written in UTF-32; save it as UTF-8"),
    "Latin-1": (
        GOOD + '{"question": "é", "answer": "2"}\n'.encode("latin-1"),
        r"line 2: byte 15 \(0xe9\) is no UTF-8",
    ),
    "Python's repr": (
        GOOD + b"{'question': '1 + 1?', 'answer': None}\n",
        "line 2: .* is a Python literal and no JSON",
    ),
    "lone surrogate": (
        GOOD * 2 + b'{"question": "\\ud83d", "answer": "2"}\n',
        r"line 3: the text of 'question' holds half a character \('\\ud83d'",
    ),
    "no object": (GOOD + b'["1 + 1?", "2"]\n', r"line 2: .* is no row; a row is an object"),
    "zero bytes": (GOOD + b"\0" * 20, "line 2: it holds zero bytes"),
    "deep lists": (
        GOOD + b'{"question": "a", "answer": ' + b"[" * 3000 + b"]" * 3000 + b"}\n",
        "line 2: lists or objects in it are nested too deeply to be read; flatten them",
    ),
    "a key twice": (
        GOOD + b'{"question": "a", "answer": "b", "answer": "c"}\n',
        "line 2: the key 'answer' is there tw",
    ),
}


@pytest.fixture(autouse=True)
def separate_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(tmp_path: Path, case: str, folder: bool) -> None:
    content, message = DAMAGED[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"rows\.jsonl.*{message}") as error:
        load_sft_dataset(str(tmp_path if folder else path))
    assert "\n" not in str(error.value)


def test_damage_far_down_a_stream_is_found_from_its_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    count = (11 << 20) // len(GOOD)  # more than is read at a time
    path.write_bytes(GOOD * count + GOOD[:-10])
    rows = load_sft_dataset(str(path), streaming=True)
    with pytest.raises(READ_ERRORS) as error:
        list(rows)
    assert f"rows.jsonl, line {count + 1}: no valid JSON" in explain_damage(str(path), error.value)


def test_damaged_array_and_parquet(tmp_path: Path) -> None:
    array = tmp_path / "rows.json"
    array.write_bytes(b"[" + GOOD + b",")
    with pytest.raises(ValueError, match=r"rows\.json, array: no valid JSON"):
        load_sft_dataset(str(array))
    parquet = tmp_path / "rows.parquet"
    Dataset.from_list([{"question": "1 + 1?", "answer": "2"}] * 100).to_parquet(parquet)
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"rows\.parquet is no whole Parquet file"):
        load_sft_dataset(str(parquet))


def test_nothing_is_wrong_with_good_files(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", GOOD + b"\n" + GOOD), ("b.json", b"[" + GOOD + b"]"), ("c.json", GOOD)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)  # with a byte order mark, as from Windows
        assert load_sft_dataset(str(tmp_path / name))[0] == {"question": "1 + 1?", "answer": "2"}
    Dataset.from_list([{"question": "1 + 1?"}]).to_parquet(tmp_path / "d.parquet")
    assert find_damage(str(tmp_path)) is None
