"""The callbacks with TRL's other trainers, whose steps take several forwards, some of them without gradients."""

import pytest

from lopt_hf.peers.layer_switching import LISA, BAdam
from lopt_hf.peers.segments import CheckpointSegments
from lopt_hf.peers.step_in_backward import StepInBackward
from tests.peers.helpers import Steps, assert_equal
from tests.tiny import make_model
from tests.trainers.helpers import KINDS, kind_kwargs, training_args
from tests.trainers.helpers import make_trainer as make_local_trainer


def train(kind, output_dir, *callbacks, **overrides):
    args = KINDS[kind].stock_config(**training_args(output_dir, **{**KINDS[kind].settings, **overrides}))
    model = make_model()
    trainer = KINDS[kind].stock_trainer(
        model=model, args=args, **kind_kwargs(kind, model, {"callbacks": list(callbacks)})
    )
    trainer.train()
    return trainer.model


@pytest.mark.parametrize("make_peer", [LISA, BAdam, StepInBackward, lambda: CheckpointSegments(2)])
def test_a_trainer_of_local_learning_takes_no_peer(make_peer, tmp_path):
    with pytest.raises(ValueError, match="trains end to end, .* pass it to a trainer of TRL or transformers"):
        make_local_trainer(tmp_path, None, {"callbacks": [make_peer()]})


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize("make_peer", [lambda: LISA(1, period=1), lambda: BAdam(period=1)], ids=["LISA", "BAdam"])
def test_only_the_active_layers_change(kind, make_peer, tmp_path):
    peer, steps = make_peer(), Steps()
    train(kind, tmp_path, peer, steps)
    for step, names in enumerate(steps.changed):
        (active,) = peer.active(step)
        layers = {name for name in names if ".layers." in name}
        assert layers and all(f".layers.{active}." in name for name in layers)
        assert (names - layers != set()) == (peer.name == "LISA")


@pytest.mark.parametrize("kind", ["dpo", "grpo"])
@pytest.mark.parametrize(
    "make_peer", [lambda: CheckpointSegments(3), StepInBackward], ids=["segments", "step in backward"]
)
def test_weights_are_those_of_the_stock_trainer(kind, make_peer, tmp_path):
    plain = train(kind, tmp_path / "plain", max_grad_norm=0.0)
    peers = train(kind, tmp_path / "peer", make_peer(), max_grad_norm=0.0)
    assert_equal(plain, peers)
