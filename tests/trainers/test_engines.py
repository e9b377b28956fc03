"""What shards is what accelerate says, and a machine without an accelerator shards nothing."""

import pytest
import torch

from tests.trainers.helpers import make_trainer

needs_no_accelerator = pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerate would shard here")


@needs_no_accelerator
def test_a_fallback_is_warned_of_once_and_trains_as_without_the_engine(tmp_path, monkeypatch, caplog):
    plain = make_trainer(tmp_path / "plain")
    assert "asked for" not in caplog.text
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    trainer = make_trainer(tmp_path / "asked")
    assert caplog.text.count("FSDP was asked for, but accelerate runs one process on cpu: nothing is sharded") == 1
    assert trainer.boundary.mode == plain.boundary.mode == "eager"
    assert trainer.learner.run == plain.learner.run
    assert not any("local_heads" in name for name, _ in trainer.model.named_parameters())
