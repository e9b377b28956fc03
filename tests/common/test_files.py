"""A file or folder is there whole, or as it was before."""

import pytest

from lopt_hf.common.files import atomic_file, publish_folder, write_text


def test_a_file_is_replaced_when_it_is_complete(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    write_text(path, "first: ü")
    with atomic_file(path) as partial:
        partial.write_text("second")
        assert path.read_text(encoding="utf-8") == "first: ü"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "earlier")
    with pytest.raises(OSError, match="disk full"), atomic_file(path) as partial:
        partial.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_takes_the_place_of_an_earlier_one(tmp_path, exists):
    staged, final = tmp_path / "incomplete" / "checkpoint-2", tmp_path / "checkpoint-2"
    write_text(staged / "weights", "new")
    if exists:
        write_text(final / "only in the earlier one", "old")
    publish_folder(staged, final)
    assert [path.name for path in final.iterdir()] == ["weights"]
    assert list(tmp_path.iterdir()) == [final]


def test_a_folder_that_another_process_has_renamed_is_left_alone(tmp_path):
    staged, final = tmp_path / "incomplete" / "checkpoint-2", tmp_path / "checkpoint-2"
    write_text(final / "weights", "of the other process")
    publish_folder(staged, final)
    assert (final / "weights").read_text() == "of the other process"
