"""What a run leaves in its folder."""

import pytest
import torch.distributed as dist

from lopt_hf.local.blocks import split_layers
from lopt_hf.pipeline.runtime.checkpoint import publish_when_complete, remove_incomplete
from lopt_hf.pipeline.runtime.stage_plan import plan_stages


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    left = [f"incomplete-{name}" for name in ("checkpoint-12", "model", f"mark-{'0a' * 16}")]
    others = ["incomplete-checkpoint", "incomplete-mark-7", "incomplete-models", "incomplete-notes", "checkpoint-12"]
    for name in (*left, *others):
        (tmp_path / name / "checkpoint-12").mkdir(parents=True)
    remove_incomplete(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(others)


def test_a_checkpoint_that_has_lost_a_part_gets_no_name(tmp_path):
    plans = plan_stages(split_layers(4, 2), 2)
    staged, final = tmp_path / "incomplete-checkpoint-2/checkpoint-2", tmp_path / "checkpoint-2"
    store = dist.HashStore()
    (staged / "stage-1").mkdir(parents=True)
    assert not publish_when_complete(store, staged, final, plans, {}, 2)
    with pytest.raises(FileNotFoundError, match="stage-0 of checkpoint-2 was written and is gone"):
        publish_when_complete(store, staged, final, plans, {}, 2)
    assert not final.exists()
