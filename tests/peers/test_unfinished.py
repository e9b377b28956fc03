"""A run that broke off leaves nothing behind in the model that the next one trains."""

import pytest
from transformers import TrainerCallback

from lopt_hf.peers.segments import CheckpointSegments
from lopt_hf.peers.step_in_backward import StepInBackward
from tests.peers.helpers import assert_equal, make_trainer
from tests.tiny import make_model


class Interrupted(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("make_peer", [StepInBackward, CheckpointSegments])
@pytest.mark.parametrize("same_trainer", [False, True], ids=["another trainer", "the same trainer"])
def test_the_next_run_is_the_ordinary_one(make_peer, same_trainer, tmp_path):
    """Both peers train as end-to-end training does; so they do after a run that broke off."""
    models = []
    for name, callbacks in (("peer", lambda: [make_peer()]), ("ordinary", list)):
        models.append(make_model())
        settings = {"max_grad_norm": 0.0, "max_steps": 3, "model": models[-1]}
        interrupted = Interrupted()
        trainer = make_trainer(tmp_path / name / "first", *callbacks(), interrupted, **settings)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        if same_trainer:
            trainer.remove_callback(interrupted)
            trainer.optimizer = trainer.lr_scheduler = None
        else:
            trainer = make_trainer(tmp_path / name / "second", *callbacks(), **settings)
        trainer.train()
    assert_equal(*models)
