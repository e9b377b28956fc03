"""The families of text decoders that transformers has, beside TRL's own trainer; most of them by `pytest -m slow`."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lopt_hf import LoPTConfig
from lopt_hf.local.blocks import split_layers
from lopt_hf.local.boundary import GradientBoundary
from lopt_hf.local.heads import LocalHeads
from lopt_hf.local.micro_batch import MicroBatch
from lopt_hf.local.objectives import LocalBatch, NoObjective, ReconstructionObjective
from lopt_hf.trainers.checks import check_model
from tests.tiny import make_model
from tests.trainers.families import FAMILIES, make_family
from tests.trainers.helpers import make_stock_trainer, make_trainer, one_step_gradients, snapshot
from tests.trainers.oracle import assert_gradients, block_gradients

# Of each way in which a decoder differs from the others one is in the fast suite: several residual streams, with and
# without a second value that layers hand on; a bias tied besides the weight; layers that return lists; layers that
# the config counts otherwise; an LM head called `decoder`.
FAST = {"deepseek_v4", "hy_v4", "big_bird", "openai-gpt", "longcat_flash", "modernbert-decoder"}
FAMILIES_BY_SPEED = [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in FAMILIES]

INPUT_IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.mark.parametrize("family", FAMILIES_BY_SPEED)
def test_a_family(family, tmp_path):
    """Gradients of one autograd, in one block each; a step moves every block; the checkpoint is stock."""
    model = make_family(family)
    start, again = copy.deepcopy(model), copy.deepcopy(model)
    # With the load-balancing loss of its routers TRL cannot train each mixture of experts.
    settings = {"router_aux_loss_coef": 0.0, "num_blocks": 3, "max_steps": 1}
    trainer = make_trainer(tmp_path, model, local_backward="joint", **settings)
    torch.manual_seed(0)
    joint = one_step_gradients(trainer)
    head = start.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())  # untied
    stock = make_stock_trainer(tmp_path / "stock", start, router_aux_loss_coef=0.0)
    assert_gradients(joint, block_gradients(stock, trainer))

    eager = make_trainer(tmp_path, again, **settings)
    assert eager.boundary.mode == "eager"
    before = snapshot(eager)
    eager.train()
    after = snapshot(eager)
    for block in eager.learner.owned():
        assert any(not torch.equal(before[name], after[name]) for name in block if name in before)
    eager.save_model(tmp_path / "saved")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        assert torch.equal(loaded.eval()(INPUT_IDS).logits, eager.model.eval()(INPUT_IDS).logits)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("cpmant", "one learned position bias feeds all of its layers"),
        ("dory", "run several times each, in loops"),
        ("hrm_text", "run several times each, in turns"),
        ("reformer", "its layers are reversible"),
        ("xlm", "lists of attentions and of MLPs"),
        ("xlnet", "permutations of the tokens"),
        ("zaya", "each layer's router reads what the router before it made"),
    ],
)
def test_a_refusal_names_the_reason_before_weights_are_loaded(family, reason, tmp_path):
    config = CONFIG_MAPPING[family]()
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be trained block by block: .*{reason}"):
        check_model(str(tmp_path), LoPTConfig(str(tmp_path / "out")), None, None)


def test_layers_that_run_twice_in_a_forward_are_found():
    """By their hooks, whatever the model is called."""
    model = make_model().train()
    blocks = split_layers(4, 2)
    boundary = GradientBoundary(model, blocks, NoObjective(), LocalHeads(), 1.0, "joint")
    model.model.layers.insert(2, model.model.layers[1])  # runs behind itself
    model.config.num_hidden_layers = 5
    reached = MicroBatch(reach=2)  # without a local loss
    with boundary.training_forward(reached), pytest.raises(RuntimeError, match="block 0 runs more than once"):
        model(input_ids=INPUT_IDS)


@pytest.mark.parametrize("family", ["deepseek_v4", "hy_v4"])
def test_streams_are_not_read_out(family, tmp_path):
    with pytest.raises(ValueError, match="hc_mult=4 streams.*local_objective='reconstruction'"):
        make_trainer(tmp_path, make_family(family), local_objective="readout")


def test_streams_are_reconstructed_each_from_itself():
    """The mean of the error over tokens that count, streams and channels, as written out."""
    torch.manual_seed(0)
    objective, output_BTND, input_BTND = ReconstructionObjective(), torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3, 8)
    head = objective.make_head(8)
    mask_BT = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    errors = [
        (head(output_BTND[row, token, stream]) - input_BTND[row, token, stream]).square().mean()
        for row, token in mask_BT.nonzero().tolist()
        for stream in range(3)
    ]
    loss = objective(head, output_BTND, input_BTND, LocalBatch(mask_BT))
    torch.testing.assert_close(loss, torch.stack(errors).mean())
