"""Which loss reaches what: compared with the same losses written out by hand on a tiny Llama."""

import pytest
import torch

from lopt_hf.local.blocks import split_layers
from tests.local.methods.mlaan.helpers import first_batch, gradients_of, make_mlaan_trainer, next_token_loss
from tests.tiny import make_model
from tests.trainers.helpers import make_stock_trainer, make_trainer, one_step_gradients

LAYERS = 4


class ByHand:
    """A Llama's forward with `detach` wherever a loss must not reach further, one loss at a time."""

    def __init__(self, trainer, inputs):
        self.trainer, self.inputs = trainer, inputs
        self.model = trainer.model
        self.blocks = split_layers(LAYERS, trainer.args.num_blocks)
        self.readout = trainer.boundary.objective.readout

    def run(self, layer, h_BTD):
        mask = self.inputs["attention_mask"]
        length = h_BTD.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
        bias = torch.zeros_like(causal, dtype=h_BTD.dtype).masked_fill(~causal, torch.finfo(h_BTD.dtype).min)
        rotary = self.model.model.rotary_emb(h_BTD, torch.arange(length)[None])
        return layer(h_BTD, attention_mask=bias, position_embeddings=rotary)

    def window(self, first, last):
        """The output of block `last`, with the gradient reaching back to block `first`."""
        h_BTD = self.model.model.embed_tokens(self.inputs["input_ids"])
        for block in self.blocks[: last + 1]:
            if block.index == first and first > 0:
                h_BTD = h_BTD.detach()
            for layer in self.model.model.layers[block.start : block.stop]:
                h_BTD = self.run(layer, h_BTD)
        return h_BTD

    def leap(self, index, h_BTD):
        auxiliary = self.trainer.local_heads[str(index)]
        for layer in auxiliary.leaps:
            if str(layer) in auxiliary.translators:
                h_BTD = auxiliary.translators[str(layer)](h_BTD)
            copied = self.run(auxiliary.copies[str(layer)], h_BTD)
            if str(layer) in auxiliary.averages:
                both = copied + self.run(auxiliary.averages[str(layer)], h_BTD)
                copied = both / 2 if auxiliary.combine == "mean" else both
            h_BTD = copied
        return h_BTD

    def losses(self):
        args, labels = self.trainer.args, self.inputs["labels"]
        last = len(self.blocks) - 1
        for j in range(last):
            own_BTD = self.window(j, j)
            reached_BTD = self.window(max(0, j - args.window + 1), j)
            yield args.independent_weight * next_token_loss(self.readout(own_BTD), labels)
            yield args.cascaded_weight * next_token_loss(self.readout(self.leap(j, reached_BTD)), labels)
        for first, weight in ((last, args.independent_weight), (max(0, last - args.window + 1), args.cascaded_weight)):
            logits = self.model.lm_head(self.model.model.norm(self.window(first, last)))
            yield weight * next_token_loss(logits, labels)

    def gradients(self):
        self.model.zero_grad()
        self.trainer.local_heads.zero_grad()
        for loss in self.losses():
            loss.backward()
        heads = {f"head.{n}": p.grad for n, p in self.trainer.local_heads.named_parameters()}
        return {**{n: p.grad for n, p in self.model.named_parameters()}, **heads}


def clones(gradients):
    return {name: None if value is None else value.clone() for name, value in gradients.items()}


@pytest.mark.parametrize(
    ("num_blocks", "window", "settings"),
    [
        (4, 1, {}),  # LAM only
        (4, 2, {}),
        (4, 3, {}),
        (2, 1, {"combine": "sum", "ema_layers": "all", "leap_layers": [2]}),
        (4, 2, {"leap_layers": [0, 0, 0], "translator": "none"}),  # MLM only
        (4, 2, {"independent_weight": 0.01, "cascaded_weight": 0.99, "leap": "last", "leap_layers": [2, 2, 1]}),
        (3, 2, {"split_at": [1, 3], "leap_layers": [[1, 3], [3]], "readout": "ema"}),
    ],
)
def test_gradients_are_those_of_the_losses_by_hand(tmp_path, num_blocks, window, settings):
    trainer = make_mlaan_trainer(tmp_path, num_blocks=num_blocks, window=window, **settings)
    inputs = first_batch(trainer)
    ours = clones(gradients_of(trainer, inputs))
    by_hand = ByHand(trainer, inputs)
    if trainer.args.split_at:
        by_hand.blocks = trainer.blocks
    expected = by_hand.gradients()
    for name, gradient in expected.items():
        if gradient is None or not gradient.any():
            assert ours[name] is None or not ours[name].any(), name
        else:
            assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("num_blocks", [2, 4])
def test_a_window_over_all_blocks_is_end_to_end(tmp_path, num_blocks):
    ours = gradients_of(make_mlaan_trainer(tmp_path / "a", num_blocks=num_blocks, window=num_blocks))
    stock = gradients_of(make_stock_trainer(tmp_path / "b"))
    assert ours.keys() == stock.keys()
    for name, gradient in stock.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_with_a_window_over_all_blocks_is_sft_trainers(tmp_path):
    # SGD: AdamW makes whole steps of the rounding errors where a gradient is zero, as a key bias's is.
    shared = {"gradient_accumulation_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    settings = {"clip_scope": "global", "num_blocks": 4, "window": 4, **shared}
    ours = make_mlaan_trainer(tmp_path / "a", make_model("gpt2"), **settings)  # tied embeddings
    stock = make_stock_trainer(tmp_path / "b", make_model("gpt2"), **shared)
    for trainer in (ours, stock):
        trainer.train()
    weights = dict(ours.model.named_parameters())
    for name, weight in stock.model.named_parameters():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("window", "blocks"), [(1, [1]), (2, [0, 1]), (3, [0, 1])])
def test_reach_of_one_loss(tmp_path, window, blocks):
    """The loss behind block 1 reaches the blocks of its window and its auxiliary: no average, no other block."""
    settings = {"num_blocks": 4, "window": window, "independent_weight": 0.0, "cascaded_weight": 1.0}
    trainer = make_mlaan_trainer(tmp_path, **settings)
    auxiliary = {f"head.1.{n}" for n, p in trainer.local_heads["1"].named_parameters() if "averages" not in n}
    for index in "02":
        del trainer.local_heads[index]
    trainer.boundary.task_share = 0.0
    gradients = gradients_of(trainer)
    reached = {name for name, gradient in gradients.items() if gradient is not None and gradient.any()}
    of_the_task = set(trainer.learner.owned()[-1])
    assert reached - of_the_task == {name for index in blocks for name in trainer.learner.owned()[index]} | auxiliary


@pytest.mark.parametrize("window", [1, 2, 3])
def test_at_most_one_window_of_graphs_lives(tmp_path, window):
    """When a block begins, those of the blocks before it in its window: all others are freed."""
    trainer = make_mlaan_trainer(tmp_path, num_blocks=4, window=window)
    living = []
    for layer in trainer.stack.layers:  # a block each
        layer.register_forward_pre_hook(lambda *_: living.append(len(trainer.boundary._segments)))
    gradients_of(trainer)
    assert living == [min(block, window - 1) for block in range(4)]


def test_the_routers_balance_stays_in_each_block_and_is_scaled(tmp_path):
    """What it adds to an early block's router is LoPT's gradient without reconstruction."""
    balance = {}
    for steps, coefficient in ((1, 0.01), (2, 0.01), (1, 0.0)):
        model = make_model("mixtral", router_aux_loss_coef=coefficient)
        trainer = make_mlaan_trainer(tmp_path, model, num_blocks=2, window=1)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = steps
        trainer.compute_loss(trainer.model, first_batch(trainer)).backward()
        trainer.learner.after_backward()
        balance[steps, coefficient] = trainer.stack.layers[0].mlp.gate.weight.grad
    expected = one_step_gradients(make_trainer(tmp_path, make_model("mixtral"), reconstruction_weight=0.0))
    expected = expected["model.layers.0.mlp.gate.weight"]
    assert expected.any()
    torch.testing.assert_close(balance[1, 0.01] - balance[1, 0.0], expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(2 * balance[2, 0.01], balance[1, 0.01])


def test_a_second_forward_before_the_end_of_the_first_is_an_error(tmp_path):
    trainer = make_mlaan_trainer(tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    trainer.compute_loss(trainer.model, first_batch(trainer))
    with pytest.raises(RuntimeError, match="call `finish`"):
        trainer.compute_loss(trainer.model, first_batch(trainer))


def test_warm_up_trains_the_auxiliaries_only(tmp_path):
    trainer = make_mlaan_trainer(tmp_path, num_blocks=4, window=1, auxiliary_warmup_steps=2, max_steps=2)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    heads = {name: parameter.detach().clone() for name, parameter in trainer.local_heads.named_parameters()}
    trainer.train()
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trainer.learner.owned()[-1])
    learning = {name: p for name, p in trainer.local_heads.named_parameters() if p.requires_grad}
    assert learning and not any(torch.equal(p, heads[name]) for name, p in learning.items())
