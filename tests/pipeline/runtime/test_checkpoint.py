"""What a run leaves in its folder."""

from types import SimpleNamespace

import pytest

from lopt_hf.pipeline.runtime.checkpoint import remove_incomplete
from lopt_hf.pipeline.runtime.stage_checkpoint import find_random_state


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    left = [f"incomplete-{name}" for name in ("checkpoint-12", "model", f"mark-{'0a' * 16}")]
    others = ["incomplete-checkpoint", "incomplete-mark-7", "incomplete-models", "incomplete-notes", "checkpoint-12"]
    for name in (*left, *others):
        (tmp_path / name / "checkpoint-12").mkdir(parents=True)
    remove_incomplete(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize("is_older", [False, True])
def test_each_replica_goes_on_with_its_own_random_state(tmp_path, is_older):
    """But for a checkpoint from before they had one: one process says so."""
    for name in ("stage-1", *(["stage-1-replica-1"] * (not is_older))):
        (tmp_path / name).mkdir()
    said, found = [], []
    for replica in range(2):
        world = SimpleNamespace(num_replicas=2, replica=replica, reports=replica == 0)
        trainer = SimpleNamespace(world=world, _say=said.append)
        found.append(find_random_state(trainer, tmp_path / "stage-1").name)
    assert found == ["stage-1", "stage-1" if is_older else "stage-1-replica-1"]
    assert len(said) == is_older
