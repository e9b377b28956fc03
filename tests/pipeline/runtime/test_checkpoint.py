"""What a run leaves in its folder."""

from lopt_hf.pipeline.runtime.checkpoint import remove_incomplete


def test_only_what_a_killed_run_left_is_removed(tmp_path):
    left = [f"incomplete-{name}" for name in ("checkpoint-12", "model", f"mark-{'0a' * 16}")]
    others = ["incomplete-checkpoint", "incomplete-mark-7", "incomplete-models", "incomplete-notes", "checkpoint-12"]
    for name in (*left, *others):
        (tmp_path / name / "checkpoint-12").mkdir(parents=True)
    remove_incomplete(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == sorted(others)
