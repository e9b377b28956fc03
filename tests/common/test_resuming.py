"""What `resume_from_checkpoint` means."""

import pytest

from lopt_hf.common.resuming import find_checkpoint


@pytest.fixture
def run(tmp_path):
    for step in (2, 10):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
    (tmp_path / "run/incomplete-checkpoint-12").mkdir()
    (tmp_path / "empty").mkdir()
    return tmp_path / "run"


@pytest.mark.parametrize("value", [None, False, "", "false", "False"])
def test_a_run_starts_anew(run, value):
    assert find_checkpoint(str(run), value) is None


@pytest.mark.parametrize("value", [True, "true", "True", "auto"])
def test_the_last_checkpoint_is_found(run, value):
    assert find_checkpoint(str(run), value) == str(run / "checkpoint-10")


def test_a_checkpoint_is_named(run):
    assert find_checkpoint("elsewhere", str(run / "checkpoint-2")) == str(run / "checkpoint-2")


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_where_there_is_none(run, folder):
    output_dir = str(run.parent / folder)
    assert find_checkpoint(output_dir, "auto") is None
    with pytest.raises(ValueError, match=f"resume_from_checkpoint=true: there is no checkpoint at '{output_dir}'"):
        find_checkpoint(output_dir, "true")
    with pytest.raises(ValueError, match="there is no checkpoint at '.*missing'; name a checkpoint's folder"):
        find_checkpoint(output_dir, str(run / "missing"))
